"""Opens the loggers that a config asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from sft_jax.config import TrainingConfig
from sft_jax.errors import UserError
from sft_jax.store.loggers.background import Background, reason
from sft_jax.store.loggers.logger import LoggedRun, Logger
from sft_jax.store.loggers.mlflow_run import Mlflow
from sft_jax.store.loggers.tensorboard import TensorBoard
from sft_jax.store.loggers.trackio_run import Trackio
from sft_jax.store.loggers.wandb_run import Wandb, check_login


@dataclass(frozen=True)
class _Service:
    """A service, the config key that turns it on, and what has to be installed and set up for it."""

    key: str
    open: Callable[[LoggedRun, str], Logger]
    package: str
    install: str
    check: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        return self.open.__name__.lower()


_SERVICES = (
    _Service("wandb_project", Wandb, "wandb", "wandb", check_login),
    _Service("mlflow_experiment", Mlflow, "mlflow", "mlflow-skinny"),
    _Service("trackio_project", Trackio, "trackio", "trackio"),
)


def check_loggers(training: TrainingConfig) -> None:
    """Check that the packages of the services that a config names are installed.

    Raises:
        UserError: one is not, or it has no login.
    """
    for service in _SERVICES:
        if getattr(training, service.key) is None:
            continue
        if not _is_installed(service.package):
            raise UserError(
                f"training.{service.key}: the package {service.package} is not installed "
                f"(pip install {service.install})"
            )
        service.check()


def open_loggers(training: TrainingConfig, run: LoggedRun, say: Callable[[str], None]) -> list[Logger]:
    """Open TensorBoard and the services that a config names.

    A service that a new run cannot open is an error: the user is there to mend it. A resumed run trains without it,
    because nobody may be there when a machine restarts.

    Raises:
        UserError: a service cannot be opened.
    """
    loggers: list[Logger] = [TensorBoard(run)] if training.tensorboard else []
    for service in _SERVICES:
        project = getattr(training, service.key)
        if project is None:
            continue
        try:
            logger = service.open(run, project)
        except Exception as error:  # each client raises its own
            problem = f"training.{service.key}: {service.name} cannot be opened: {reason(error)}"
            if not run.is_resumed:
                for opened in loggers:
                    opened.close(failed=True)
                raise UserError(f"{problem}; mend this, or set training.{service.key}=null") from error
            say(f"{problem}; it gets nothing from here on, metrics.jsonl is complete")
            continue
        loggers.append(Background(logger, service.name, say))
    for logger in loggers:
        logger.hyperparameters(run.config)
    return loggers


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module without a spec, or None in sys.modules
        return False
