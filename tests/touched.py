"""Which drills a change asks for: those that name a path below which something has changed."""

import subprocess

import pytest


def untouched(items: list[pytest.Item], base: str) -> list[pytest.Item]:
    """Drills of whose paths, the arguments of ``pytest.mark.drill``, none has changed since the commit ``base``.

    A drill whose own file has changed, or that names no path, always runs.
    """
    done = subprocess.run(["git", "diff", "--name-only", base], capture_output=True, text=True, check=True)
    changed = done.stdout.splitlines()

    def is_touched(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("drill")
        if marker is None or not marker.args:
            return True
        paths = [*marker.args, str(item.path.relative_to(item.config.rootpath))]
        return any(name == path or name.startswith(f"{path}/") for name in changed for path in paths)

    return [item for item in items if not is_touched(item)]
