"""Batches on the mesh: every host builds its own rows of the same global batch, from any step on."""

import jax
import numpy as np
import pytest
from kit import make_tokenizer, write_chats

from sft_jax.config import SourceConfig
from sft_jax.data.batches.loader import Loader, StepSource, local_sequences
from sft_jax.data.batches.packing import plan_run
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import encode_sources
from sft_jax.sharding import make_mesh

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    path = write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")
    return encode_sources(open_sources([SourceConfig(path=str(path))]), Encoder(make_tokenizer()), 128)[0]


def test_the_hosts_rows_together_are_the_batch(examples):
    plan = plan_run(examples.num_tokens, 128, 8, 2)
    whole = StepSource(examples, plan, 8, slice(0, 8))
    parts = [StepSource(examples, plan, 8, slice(start, start + 2)) for start in range(0, 8, 2)]
    for step in range(plan.num_steps):  # the last step of an epoch has fewer rows: its last hosts get padding
        together = jax.tree.map(lambda *rows: np.concatenate(rows), *(part[step] for part in parts))
        jax.tree.map(np.testing.assert_array_equal, together, whole[step])


def test_from_any_step_on_and_on_any_mesh(examples):
    plan = plan_run(examples.num_tokens, 128, 8, 2)
    one, eight = make_mesh(devices=jax.devices()[:1]), make_mesh(2, 1, 2, 2)
    assert local_sequences(eight, 8) == slice(0, 8)
    batches = list(Loader(examples, plan, one, 8))
    assert len(batches) == plan.num_steps
    later = Loader(examples, plan, eight, 8)
    later.set_state({"next_index": 2})
    rest = list(later)
    assert len(rest) == plan.num_steps - 2
    assert later.get_state() == {"next_index": plan.num_steps}
    assert len(rest[0].inputs.sharding.device_set) == 8
    for ours, theirs in zip(rest, batches[2:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
