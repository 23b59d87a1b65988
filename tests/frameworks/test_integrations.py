"""Tests of the adapters with the real frameworks; `make frameworks` runs them, `make test` does not collect them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from ranks import run_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bagua_syncbn_algo import SyncBatchNorm2d, sync_batchnorm_layers

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 100.0  # seconds; the import of a framework takes most of it on a busy machine


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: List[nn.Module] = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)]
    return nn.Sequential(*layers).double()


def images(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (1 + rank) * torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)


def expected() -> Dict[str, Tensor]:
    """Returns the state after one step of one process on the images of both ranks."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.cat([images(0), images(1)])).square().mean().backward()
    optimizer.step()
    return net.state_dict()


def assert_equal(found: Dict[str, Tensor]) -> None:
    """The tolerance is that of rounding in float64; with statistics of one rank, the running mean differs by 1e-2."""
    reference = expected()
    assert list(found) == list(reference)
    for name, tensor in reference.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


def fit(rank: int, package: str) -> Dict[str, Any]:
    import importlib

    pl = importlib.import_module(package)
    strategies = importlib.import_module(f"{package}.strategies")
    adapter = importlib.import_module(f"bagua_syncbn_algo.integrations.{package.split('.')[0]}")
    seen: Dict[str, Any] = {}

    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            seen["layers"] = [type(layer) for layer in sync_batchnorm_layers(self)]
            loss: Tensor = self.net(batch).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategies.DDPStrategy(process_group_backend="gloo", broadcast_buffers=False),
        plugins=[adapter.BaguaSyncBatchNorm()],
        precision="64-true",
        max_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader([images(rank)], batch_size=None))
    return {**seen, "after": type(module.net[1]), "state": module.net.state_dict()}


@pytest.mark.multirank
@pytest.mark.timeout(150)
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_trainer_trains_like_one_process(package: str) -> None:
    """Catches a plugin that Lightning does not call, layers that stay converted, and layers of another package."""
    for result in run_processes(2, fit, package, limit=LIMIT):
        assert result["layers"] == [SyncBatchNorm2d] and result["after"] is nn.BatchNorm2d
        assert_equal(result["state"])


def run_fabric(rank: int) -> Dict[str, Tensor]:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    from bagua_syncbn_algo import convert_sync_batchnorm

    strategy = DDPStrategy(process_group_backend="gloo", broadcast_buffers=False)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = convert_sync_batchnorm(network())
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(wrapped(images(rank)).square().mean())
    optimizer.step()
    return model.state_dict()


@pytest.mark.multirank
@pytest.mark.timeout(150)
def test_fabric_trains_like_one_process() -> None:
    """Catches a conversion that fabric.setup undoes or does not find."""
    for state in run_processes(2, run_fabric, limit=LIMIT):
        assert_equal(state)


def run_mmengine(rank: int, folder: str, options: Dict[str, Any]) -> Dict[str, Any]:
    import torch.distributed as dist
    from mmengine.model import BaseModel
    from mmengine.registry import RUNNERS

    import bagua_syncbn_algo.integrations.mmengine  # noqa: F401  (registers the Runner)

    class Model(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def init_weights(self) -> None:
            pass  # the Runner would draw other weights

        def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
            return {"loss": self.net(inputs).square().mean()}

    dist.init_process_group("gloo")  # the Runner would select a CUDA device first
    model = Model()
    wrapper = {"type": "MMDistributedDataParallel", "device_ids": None}  # DDP refuses device_ids on CPU
    hooks = ("checkpoint", "logger", "runtime_info", "sampler_seed", "param_scheduler", "timer")
    runner = RUNNERS.get("SyncBatchNormRunner")(
        model=model,
        work_dir=folder,
        train_dataloader=DataLoader([{"inputs": images(rank)}], batch_size=None),
        train_cfg={"by_epoch": False, "max_iters": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        cfg={"model_wrapper_cfg": wrapper, **options},
        launcher="pytorch",
        env_cfg={"dist_cfg": {"backend": "gloo"}},
        log_level="ERROR",
        default_hooks=dict.fromkeys(hooks),
    )
    runner.train()
    return {"layers": [type(layer) for layer in sync_batchnorm_layers(model)], "state": model.net.state_dict()}


@pytest.mark.multirank
@pytest.mark.timeout(150)
def test_the_runner_trains_like_one_process(tmp_path: Path) -> None:
    """Catches a Runner that is not registered, and one that wraps the model before the conversion."""
    for result in run_processes(2, run_mmengine, str(tmp_path), {}, limit=LIMIT):
        assert result["layers"] == [SyncBatchNorm2d]
        assert_equal(result["state"])


@pytest.mark.multirank
@pytest.mark.timeout(150)
def test_the_runner_refuses_a_second_synchronization(tmp_path: Path) -> None:
    """Catches a config whose sync_bn would replace the layers of this package."""
    errors = run_processes(2, run_mmengine, str(tmp_path), {"sync_bn": "torch"}, errors=True, limit=LIMIT)
    assert all("expected no sync_bn" in str(error) for error in errors)


@pytest.mark.multirank
@pytest.mark.timeout(150)
def test_the_example_trains() -> None:
    """Catches an example that fails, and ranks whose running statistics differ: synchronized ones are the same."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(REPOSITORY / "examples" / "lightning_digits.py"), "--steps", "10"]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stderr
    found = [line.split("test accuracy ")[1].split(" %")[0] for line in done.stdout.splitlines() if "accuracy" in line]
    assert done.stdout.count("test accuracy") == 2 and len(set(found)) == 1, done.stdout
