"""Of two processes that write to one place at once, one wins, and the other says so or waits."""

import pytest
from fake_gcs import Bucket
from kit import child_environment, config_of, write_chats
from warm import Warm

from sft_jax import config_file as configs


@pytest.mark.drill("sft_jax/files", "sft_jax/store", "sft_jax/run")
@pytest.mark.parametrize("command", ["train", "export"])
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_of_two_at_once_one_wins(command, place, tiny, chats, tmp_path, is_full):
    config = tmp_path / "config.yaml"
    keys = {"training__max_steps": 60, "training__save_every": 20}
    configs.save(config_of(tiny, chats, tmp_path / "run", **keys), config)
    with Bucket() as bucket, Warm(**child_environment(**bucket.environment())) as warm:
        assert warm.run("train", config, "training.max_steps=4").code == 0
        lines = []
        for number in range(10 if is_full else 2):
            target = f"{tmp_path if place == 'disk' else 'gs://bucket'}/{number}"
            arguments = ["train", config, f"training.output_dir={target}"]
            if command == "export":
                arguments = ["export", tmp_path / "run", target]
            ended = [life.wait(200) for life in [warm.start(*arguments) for _ in range(2)]]
            assert all(one.is_clean for one in ended), [one.err for one in ended]
            assert sorted(one.code for one in ended) == [0, 2], [one.err for one in ended]
            lines.append(next(one.err.strip().splitlines()[-1] for one in ended if one.code))
    print(f"{command}, {place}: {len(lines)} times one of two; the other says, for example: {lines[0]}")


@pytest.mark.drill("sft_jax/data/tokens", "sft_jax/files")
def test_of_two_tokenizations_one_is_done(tiny, tmp_path, is_full):
    waited = 0
    with Warm(**child_environment()) as warm:
        for number in range(20 if is_full else 2):
            chats = write_chats(tmp_path / f"{number}.jsonl", 4_000, seed=number)
            configs.save(config_of(tiny, chats, tmp_path / "run", training__max_steps=1), tmp_path / "config.yaml")
            environment = {"SFT_JAX_CACHE": str(tmp_path / "cache")}
            outs = [f"training.output_dir={tmp_path / f'{number}-{i}'}" for i in range(2)]
            lives = [warm.start("train", tmp_path / "config.yaml", out, environment=environment) for out in outs]
            ended = [life.wait(200) for life in lives]
            assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
            texts = [one.out + one.err for one in ended]
            assert sum("tokenized in" in text for text in texts) == 1, texts
            assert sum("tokens from the cache" in text for text in texts) == 1, texts
            waited += any("is being tokenized by process" in text for text in texts)
        left = [one.name for one in (tmp_path / "cache" / "tokens").iterdir() if one.name.startswith(".")]
        assert not left
    print(f"{number + 1} times one of two; {waited} times the other waited")
