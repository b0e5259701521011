"""The process group of DDP: nothing is wrapped, so no buffer is overwritten or refused; steps all-reduce."""

from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning import Callback
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy

from trainer.distributed.failure import explained, leave_group
from trainer.distributed.local_ranks import LocalRanks
from trainer.distributed.waiting import interruptible
from trainer.errors import Stopped

_LEAVE = 10.0  # seconds for ranks to leave by themselves


class RankStrategy(DDPStrategy):
    """DDP's process group without its module wrapper; the ranks leave together."""

    def __init__(self, others: LocalRanks, **kwargs: Any):
        super().__init__(**kwargs)
        self.others = others
        self.failed = False

    def configure_ddp(self) -> None:
        pass

    def setup_distributed(self) -> None:
        interruptible(super().setup_distributed)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        interruptible(lambda: super(RankStrategy, self).barrier(*args, **kwargs))

    def on_exception(self, exception: BaseException) -> None:
        self.failed = not (isinstance(exception, Stopped) and exception.agreed)
        super().on_exception(exception)

    def teardown(self) -> None:
        super().teardown()
        met = dist.is_initialized()
        leave_group(together=not self.failed)
        self.others.end(_LEAVE if met else 0.0)  # those who have met nobody wait for us


class FailTogether(Callback):
    """Asks, as the first to hear of an error, which rank's it was, while the ranks can still be asked."""

    def __init__(self, others: LocalRanks):
        self.others = others

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.others.leave()
        explained(exception)


class SlurmStep(SLURMEnvironment):
    """The ``size`` tasks that srun started, counted and checked already (Lightning wants --ntasks-per-node as well)."""

    def __init__(self, size: int):
        self.size = size
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_variables() -> None:
        pass

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass

    def world_size(self) -> int:
        return self.size
