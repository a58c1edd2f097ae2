"""Compiled programs kept on disk: a second start compiles nothing, computes the same bits, and uses no damaged file."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from kit import child_environment, run_config

from sft_jax import config_file as configs
from sft_jax.config import LoraConfig
from sft_jax.files.digests import file_digest
from sft_jax.training import programs
from sft_jax.training.programs import kind_of_processor, remove_damaged

X86 = """processor\t: {core}
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
cpu MHz\t\t: {mhz}
flags\t\t: fpu sse2 {flags}
"""


def cpuinfo(flags="avx2", mhz=2596.1, cores=2):
    return "\n".join(X86.format(core=core, mhz=mhz + core, flags=flags) for core in range(cores))


@pytest.mark.smoke
def test_kind_of_processor(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(programs, "_CPU_INFO", file)
    assert kind_of_processor() is None  # no such file: a system without it

    def kind(**changes):
        file.write_text(cpuinfo(**changes))
        return kind_of_processor()

    first = kind()
    assert first == kind(mhz=1200.5)  # the clock changes all the time
    assert first != kind(flags="avx2 avx512f")
    monkeypatch.setenv("NPROC", "1")
    assert first != kind()
    file.write_text("processor\t: 0\n")
    assert kind_of_processor() is None


@pytest.mark.smoke
def test_only_recorded_programs_stay(tmp_path):
    def write(name, content, is_recorded=True, damage=b""):
        program = tmp_path / f"{name}-cache"
        program.write_bytes(content)
        if is_recorded:
            (tmp_path / f"{name}-cache.digest").write_text(file_digest(program))
        program.write_bytes(content + damage)

    write("whole", b"a" * 100)
    write("interrupted", b"b" * 100, is_recorded=False)
    write("damaged", b"c" * 100, damage=b"!")
    remove_damaged(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["whole-cache", "whole-cache.digest"]
    write("newer", b"d" * 100)
    remove_damaged(tmp_path, max_bytes=150)
    assert len(list(tmp_path.glob("*-cache"))) == 1
    remove_damaged(tmp_path / "none")


@pytest.mark.smoke
@pytest.mark.skipif(kind_of_processor() is None, reason="the kind of this processor is unknown")
def test_a_second_start_compiles_nothing_and_computes_the_same(tiny, chats, tmp_path):
    changes = {"training__max_steps": 3, "training__eval_every": 100, "training__save_every": 2}
    config = run_config(tiny, chats, tmp_path / "run", lora=LoraConfig(rank=4), **changes)
    configs.save(config, tmp_path / "run.yaml")
    environment = child_environment(SFT_JAX_CACHE=str(tmp_path / "cache"))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):  # of the tests
        environment.pop(name, None)

    def start():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        command = [sys.executable, "-m", "sft_jax", "train", str(tmp_path / "run.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        checkpoint = json.loads(next((tmp_path / "run" / "checkpoints" / "3" / "run").iterdir()).read_text())
        assert not re.search("cpu_aot|machine feature|compilation cache", done.stderr), done.stderr  # of the compiler
        return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row], checkpoint["digests"]

    first = start()
    (folder,) = (tmp_path / "cache" / "programs").iterdir()
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("*-cache")}
    assert folder.name == f"cpu-{kind_of_processor()}"
    assert any(name.startswith("jit_train_step") for name in kept)
    assert {f"{name}.digest" for name in kept} == {file.name for file in folder.glob("*.digest")}
    assert start() == first
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*-cache")} == kept

    program = next(folder.glob("jit_train_step*-cache"))
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
    assert start() == first
    assert program.read_bytes() != content
