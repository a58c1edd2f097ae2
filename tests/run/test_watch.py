"""The live page of a run, and the server that shows it to browsers of this machine only."""

import http.client
import threading

import numpy as np
import pytest
from kit import config_of, one_device

from sft_jax.config import SourceConfig
from sft_jax.errors import UserError
from sft_jax.report.live import live_page
from sft_jax.report.loss import loss_curves, smoothed, thinned
from sft_jax.run import recorder
from sft_jax.run.train import train
from sft_jax.run.watch import watch


def get(server, path="/", host=None):
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


@pytest.fixture
def served():
    """Serves a run in a thread."""
    servers = []

    def start(run):
        server = watch(str(run), 0)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_run_is_watched_while_it_trains(tiny, chats, tmp_path, served, monkeypatch):
    monkeypatch.setattr(recorder, "_SECONDS_BETWEEN_DRAWINGS", 0.0)
    run = tmp_path / "a & b"
    changes = {"data__eval": [SourceConfig(path=str(chats))], "training__eval_every": 2, "training__save_every": 2}
    pages, drawn = [], []

    def look(kind, step, metrics):
        if (kind, step) == ("step", 3):
            server = served(run)
            pages.append(get(server)[1].decode())
            drawn.append((run / "report" / "loss.png").is_file())

    samples = {
        "evaluation__samples": ["which <b>river</b>"],
        "evaluation__max_new_tokens": 2,
        "evaluation__samples_every": 2,
    }
    train(config_of(tiny, chats, run, **changes, **samples, training__max_steps=4), one_device(), callbacks=[look])
    (page,) = pages
    assert drawn == [True]
    assert "<dt>step</dt><dd>3 of 4</dd>" in page
    assert '<meta http-equiv="refresh"' in page
    assert "training by process" in page
    assert page.count("<svg") == 4
    assert "which &lt;b&gt;river" in page
    assert "a &amp; b" in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    server = served(run)
    done, body = get(server)
    assert b"<p>done" in body
    assert b"http-equiv" not in body
    assert done.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert get(server, "/loss.png")[1] == (run / "report" / "loss.png").read_bytes()


def test_the_server_answers_nothing_else(tiny, chats, tmp_path, served):
    train(config_of(tiny, chats, tmp_path / "run", training__max_steps=1), one_device())
    server = served(tmp_path / "run")
    for path in ("/config.yaml", "/../config.yaml", "/%2e%2e/config.yaml", "//etc/passwd", "/report.html"):
        assert get(server, path)[0].status == 404, path
    for host in ("attacker.example", "attacker.example:80", "127.0.0.1.attacker.example"):
        assert get(server, "/", host)[0].status == 403, host
    assert get(server, "/", "localhost:1")[0].status == 200
    with pytest.raises(UserError, match="not a run directory"):
        watch(str(tmp_path / "none"), 0)
    with pytest.raises(OSError, match="in use"):
        watch(str(tmp_path / "run"), server.server_address[1])


def test_a_run_that_has_just_begun(tmp_path):
    page = live_page("run", tmp_path, [{"step": 0, "eval_loss": 2.0}], "process 1")
    assert "No step is done yet" in page


def test_smoothing_has_no_bias():
    """It follows a falling line to both ends, where an exponential average would lag behind by many steps."""
    steps = np.arange(2000)
    falling = 8.0 - steps / 400
    noisy = falling + np.random.default_rng(0).normal(0, 0.5, 2000)
    line = smoothed(list(zip(steps.tolist(), noisy.tolist(), strict=True)))
    at, values = np.asarray(line).T
    errors = values - falling[at.astype(int)]
    assert len(line) == 1000
    assert abs(errors[0]) < 0.3
    assert abs(errors[-1]) < 0.3
    assert np.abs(errors).mean() < 0.06
    assert smoothed([(1, 2.0), (2, 1.0)]) == [(1, 2.0), (2, 1.0)]


def test_a_long_line_keeps_its_spikes():
    line = [(step, 1.0) for step in range(50_000)]
    line[31_234] = (31_234, 99.0)
    thin = thinned(line)
    assert len(thin) <= 1000
    assert (31_234, 99.0) in thin
    assert [step for step, _ in thin] == sorted(step for step, _ in thin)


def test_losses_over_a_decade_have_a_logarithmic_axis():
    rows = [{"step": step, "loss": 10.0 * 0.8**step} for step in range(30)]
    assert loss_curves(rows).is_logarithmic
    assert not loss_curves(rows[:5]).is_logarithmic
