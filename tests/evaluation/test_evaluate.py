{"tests": {}, "files": {}}
