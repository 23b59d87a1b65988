"""The frameworks and entry points that `benchmarks/frameworks.py` runs. Nothing is downloaded."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import torch
import torch.nn.functional as F
from framework_job import LEARNING_RATE, STEPS, Batch, Case, Job, loop, start, steps, with_options
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

CLASSES = 5

# -- data and losses --------------------------------------------------------------------------------------------------


def labels(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=generator)


def masks(count: int, generator: torch.Generator, size: int = 64) -> Tensor:
    return torch.randint(CLASSES, (count, size, size), generator=generator)


def boxes(count: int, generator: torch.Generator) -> List[Dict[str, Tensor]]:
    """Returns two boxes for each image, as torchvision's detection models expect them."""
    corners = 30 * torch.rand(count, 2, 2, generator=generator, dtype=torch.float64)
    found = torch.cat([corners, corners + 20], dim=2)
    return [{"boxes": each, "labels": torch.randint(1, CLASSES, (2,), generator=generator)} for each in found]


def classification(model: Callable[..., Any], batch: Batch) -> Tensor:
    images, target = batch
    return F.cross_entropy(model(images).float() if images.dtype == torch.float32 else model(images), target)


def sum_of_pyramid(model: Callable[..., Any], batch: Batch) -> Tensor:
    images, _ = batch
    levels = model(images)
    return torch.stack([level.square().mean() for level in levels]).sum()


def labelled(model: Callable[..., Any], batch: Batch) -> Tensor:
    """The loss that a Hugging Face model computes, if it is called with labels."""
    images, target = batch
    loss: Tensor = model(pixel_values=images, labels=target).loss
    return loss


def detection(model: Callable[..., Any], batch: Batch) -> Tensor:
    """The sum of the losses that a detector of torchvision returns in training."""
    images, targets = batch
    targets = [{"boxes": each["boxes"].to(images.dtype), "labels": each["labels"]} for each in targets]
    return torch.stack(list(model(list(images), targets).values())).sum()


def segmentation(model: Callable[..., Any], batch: Batch) -> Tensor:
    images, target = batch
    outputs = model(images)
    return F.cross_entropy(outputs["out"], target) + 0.4 * F.cross_entropy(outputs["aux"], target)


def three_classifiers(model: Callable[..., Any], batch: Batch) -> Tensor:
    images, target = batch
    outputs = model(images)
    first = F.cross_entropy(outputs.logits, target)
    return first + 0.3 * (F.cross_entropy(outputs.aux_logits1, target) + F.cross_entropy(outputs.aux_logits2, target))


# -- models -----------------------------------------------------------------------------------------------------------


def without_dropout(model: nn.Module) -> nn.Module:
    """Returns ``model`` without dropout: random numbers of two ranks are not those of one process."""
    for part in model.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
    return model


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    if not options.get("features_only"):
        options.setdefault("num_classes", CLASSES)
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return without_dropout(model)


class PooledFeatures(nn.Module):
    """A model that calls ``forward_features`` of a part, as many transfer-learning scripts do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.classifier = nn.Linear(512, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.classifier(self.net.forward_features(images).mean((2, 3)))  # type: ignore[operator]
        return output


def pooled_features() -> nn.Module:
    return PooledFeatures(timm_model("resnet18", num_classes=0))


def hugging_face(name: str) -> nn.Module:
    import transformers

    if name == "ResNet":
        config: Any = transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic", num_labels=CLASSES
        )
        return without_dropout(transformers.ResNetForImageClassification(config))
    if name == "MobileNetV2":
        config = transformers.MobileNetV2Config(num_labels=CLASSES, depth_multiplier=0.35, classifier_dropout_prob=0.0)
        return without_dropout(transformers.MobileNetV2ForImageClassification(config))
    sizes: Dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}
    config = transformers.SegformerConfig(**sizes, num_attention_heads=[1, 1, 1, 1], num_labels=CLASSES)
    config.drop_path_rate = 0.0
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = config.classifier_dropout_prob = 0.0
    return without_dropout(transformers.SegformerForSemanticSegmentation(config))


def retinanet() -> nn.Module:
    """RetinaNet with BatchNorm in the backbone, in the pyramid and in the heads, which run once for each level."""
    import torchvision
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    trunk = torchvision.models.resnet18(weights=None)
    backbone = _resnet_fpn_extractor(
        trunk, 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256), norm_layer=nn.BatchNorm2d
    )
    head = RetinaNetHead(backbone.out_channels, 9, CLASSES, norm_layer=nn.BatchNorm2d)
    model: nn.Module = RetinaNet(backbone, CLASSES, head=head, min_size=64, max_size=64)
    return model


def torchvision_model(name: str, **options: Any) -> nn.Module:
    import torchvision

    models: Any = torchvision.models
    factory = getattr(models.segmentation, name, None) or getattr(models, name)
    return without_dropout(factory(num_classes=CLASSES, **options))


def resnet18() -> nn.Module:
    return timm_model("resnet18")


# -- how frameworks train ---------------------------------------------------------------------------------------------


class Batches(Dataset):  # type: ignore[type-arg]
    """The batches of all steps, as a dataset whose items are batches, for loaders with ``batch_size=None``."""

    def __init__(self, job: Job) -> None:
        self.batches = job.all_batches()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


def timm_loop(job: Job, model: nn.Module) -> None:
    """The loop of timm's train script: channels_last, autocast, accumulation, and an average of the weights."""
    from timm.utils import ModelEmaV3

    model = job.convert(model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    job.observe(model)
    average = ModelEmaV3(model, decay=0.5)
    wrapped = job.wrap(model)
    optimizer = job.optimizer(model)
    steps(job, wrapped, optimizer, after=lambda: average.update(model))
    # The average is compared through the running statistics, which it copies and averages.
    job.statistics.update({f"average.{name}": each.double() for name, each in average.module.named_buffers()})


def checkpointed(job: Job, model: nn.Module) -> None:
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    with_options(static_graph=True)(job, model)


def fsdp(blocks: bool, job: Job, model: nn.Module) -> None:
    """``fully_shard`` on a CPU mesh, of the model only or also of its stages."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(job.shards[0])
    model = job.convert(model)
    job.observe(model)
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    for name in ("layer1", "layer2", "layer3", "layer4") if blocks else ():
        fully_shard(getattr(model, name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    steps(job, model, job.optimizer(model))


def lightning_trainer(style: str, job: Job, model: nn.Module) -> None:
    """A Trainer with the plugin of this package.

    Args:
        style: ``"part"``: ``training_step`` calls a submodule; ``"self"``: it calls the module itself.
        job: the job.
        model: the model.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy

    from bagua_syncbn_algo.integrations.lightning import BaguaSyncBatchNorm

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, images: Tensor) -> Any:
            return self.net(images)

        def training_step(self, batch: Batch, number: int) -> Tensor:
            return job.case.loss(self.net if style == "part" else self, batch)

        def configure_optimizers(self) -> Any:
            job.observe(self.net, self)  # the plugin has converted the layers
            return job.optimizer(self.net)

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", broadcast_buffers=False),
        plugins=[BaguaSyncBatchNorm()],
        precision="bf16-mixed" if job.autocast else ("32-true" if job.dtype == torch.float32 else "64-true"),
        accumulate_grad_batches=job.case.accumulate,
        max_epochs=1,
        use_distributed_sampler=False,
        **_quiet(),
    )
    trainer.fit(Module(), DataLoader(Batches(job), batch_size=None))


def _quiet() -> Dict[str, Any]:
    return {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def lightning_fabric(job: Job, model: nn.Module) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", broadcast_buffers=False)
    fabric = Fabric(
        accelerator="cpu", devices=2, strategy=strategy, precision="bf16-mixed" if job.autocast else "64-true"
    )
    fabric.launch()
    model = job.convert(model)
    job.observe(model)
    wrapped, optimizer = fabric.setup(model, job.optimizer(model))
    for step in range(STEPS):
        optimizer.zero_grad()
        (batch,) = job.batches(step)
        fabric.backward(job.case.loss(wrapped, batch))
        optimizer.step()


def accelerator(job: Job, model: nn.Module) -> None:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    launcher = Accelerator(
        cpu=True,
        mixed_precision="bf16" if job.autocast else "no",
        gradient_accumulation_steps=job.case.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    model = job.convert(model)
    job.observe(model)
    optimizer = job.optimizer(model)
    wrapped, prepared = launcher.prepare(model, optimizer)
    for batch in job.all_batches():
        with launcher.accumulate(wrapped):
            launcher.backward(job.case.loss(wrapped, batch))
            prepared.step()
            prepared.zero_grad()


def hugging_face_trainer(job: Job, model: nn.Module) -> None:
    import tempfile

    import transformers

    model = job.convert(model)
    job.observe(model)
    images, target = (torch.cat([batch[i] for batch in job.all_batches()]) for i in (0, 1))
    # The sampler gives consecutive images to the ranks in turn; the same images on every rank would repeat.
    start(job.shards[0])
    gathered = []
    for own in (images, target):
        everyone = [torch.empty_like(own) for _ in range(2)]
        torch.distributed.all_gather(everyone, own.contiguous())
        gathered.append([rank.split(job.case.images) for rank in everyone])
    # One step after the other, and in each step one rank after the other.
    steps = [torch.cat([chunk for step in zip(*ranks) for chunk in step]) for ranks in gathered]
    data = [{"pixel_values": image, "labels": label} for image, label in zip(*steps)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=job.case.images,
            gradient_accumulation_steps=job.case.accumulate,
            max_steps=STEPS,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            learning_rate=LEARNING_RATE,
            ddp_backend="gloo",
            ddp_broadcast_buffers=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            # By default, the loss of a model with **kwargs is multiplied by the number of ranks.
            average_tokens_across_devices=False,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=data,
            optimizers=(job.optimizer(model), None),
        )
        trainer.train()


def mmengine_runner(job: Job, model: nn.Module) -> None:
    """A Runner of MMEngine with this package's subclass; the model is called with ``mode="loss"``."""
    import tempfile

    from mmengine.model import BaseModel
    from mmengine.optim import OptimWrapper

    from bagua_syncbn_algo.integrations.mmengine import SyncBatchNormRunner

    class Classifier(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def init_weights(self) -> None:
            """Keeps the weights: the Runner would draw new ones, and the reference has those of ``model``."""

        def forward(self, inputs: Tensor, targets: Tensor, mode: str = "tensor") -> Any:
            return {"loss": job.case.loss(self.net, (inputs, targets))}

    built = Classifier()
    with tempfile.TemporaryDirectory() as folder:
        runner = SyncBatchNormRunner(
            model=built,
            work_dir=folder,
            train_dataloader=DataLoader(Batches(job), batch_size=None),
            train_cfg={"by_epoch": False, "max_iters": STEPS},
            optim_wrapper=OptimWrapper(job.optimizer(model)),
            # Without device_ids, which DistributedDataParallel refuses on CPU.
            cfg={"model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None}},
            launcher="pytorch",
            env_cfg={"dist_cfg": {"backend": "gloo"}},
            log_level="ERROR",
            default_hooks=dict.fromkeys(("checkpoint", "logger", "runtime_info", "sampler_seed", "param_scheduler")),
        )
        job._model, job._converted = model, (built,)  # `train` converts the layers; the first step notes the plan
        runner.train()


# -- two models -------------------------------------------------------------------------------------------------------


def gan() -> nn.Module:
    def block(channels_in: int, channels_out: int, stride: int = 1) -> List[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1)
        return [convolution, nn.BatchNorm2d(channels_out), nn.LeakyReLU(0.2)]

    generator = nn.Sequential(*block(3, 16), *block(16, 16), nn.Conv2d(16, 3, 3, padding=1))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 1)]
    discriminator = nn.Sequential(*block(3, 16, 2), *block(16, 32, 2), *head)
    return nn.ModuleDict({"generator": generator, "discriminator": discriminator})


def gan_loop(job: Job, model: nn.Module) -> None:
    """A discriminator step on real and on generated images, then a generator step through the discriminator."""
    parts: Any = model
    for name in ("generator", "discriminator"):
        parts[name] = job.convert(parts[name])
    job.observe(model, *parts.values())
    generator, discriminator = (job.wrap(parts[name]) for name in ("generator", "discriminator"))
    of_discriminator = job.optimizer(parts["discriminator"], last=False)
    of_generator = job.optimizer(parts["generator"])
    of_generator._names = {key: f"generator.{name}" for key, name in of_generator._names.items()}
    of_discriminator._names = {key: f"discriminator.{name}" for key, name in of_discriminator._names.items()}
    for step in range(STEPS):
        batches = job.batches(step)
        of_discriminator.zero_grad()
        for images, _ in batches:
            # One backward for each forward: DistributedDataParallel prepares one reduction at a time.
            loss = F.softplus(-discriminator(images)).mean()
            (loss / len(batches)).backward()
            loss = F.softplus(discriminator(generator(images).detach())).mean()
            (loss / len(batches)).backward()
        of_discriminator.step()
        of_generator.zero_grad()
        for images, _ in batches:
            parts["discriminator"].requires_grad_(False)
            loss = F.softplus(-discriminator(generator(images))).mean()
            parts["discriminator"].requires_grad_(True)
            (loss / len(batches)).backward()
        of_generator.step()


class Byol(nn.Module):
    """An online encoder with projector and predictor, and a momentum encoder and projector without gradients."""

    def __init__(self) -> None:
        super().__init__()

        def mlp(channels_in: int) -> nn.Module:
            return nn.Sequential(nn.Linear(channels_in, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))

        self.online = nn.Sequential(timm_model("resnet18", num_classes=0), mlp(512))
        self.predictor = mlp(32)
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        predicted = [self.predictor(self.online(view)) for view in (first, second)]
        with torch.no_grad():
            targets = [self.momentum(view) for view in (second, first)]
        losses = [2 - 2 * F.cosine_similarity(p, t, dim=1).mean() for p, t in zip(predicted, targets)]
        return losses[0] + losses[1]

    @torch.no_grad()
    def update(self) -> None:
        for of_online, of_momentum in zip(self.online.parameters(), self.momentum.parameters()):
            of_momentum.lerp_(of_online, 0.01)


def byol_loss(model: Callable[..., Any], batch: Batch) -> Tensor:
    images, _ = batch
    loss: Tensor = model(images, images.flip(3) * 1.5)
    return loss


def byol_loop(job: Job, model: nn.Module) -> None:
    parts: Any = model
    model = job.convert(model)
    job.observe(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps(job, job.wrap(model), job.optimizer(model, parameters=trained), after=parts.update)


def compiled(backend: str) -> Any:
    return partial(torch.compile, backend=backend)


BF16 = "bfloat16: compare with one process in bfloat16"


def cases() -> List[Case]:
    """Returns all rows of the table."""
    ddp = "DistributedDataParallel"

    def row(framework: str, entry: str, build: Callable[[], nn.Module], train: Any = None, **options: Any) -> Case:
        options.setdefault("loss", classification)
        options.setdefault("targets", labels)
        return Case(framework, entry, build, train, **options)

    def timm(name: str, entry: str, train: Any = None, features_only: bool = False, **options: Any) -> Case:
        chosen: Any = {"features_only": True} if features_only else {}
        return row("timm", f"{name}, {entry}", partial(timm_model, name, **chosen), train, **options)

    tv = "torchvision"
    seg: Dict[str, Any] = {"loss": segmentation, "targets": masks}
    two: Tuple[int, int] = (2, 2)
    return [
        row(ddp, "resnet18 of timm", resnet18),
        row(ddp, "static_graph", resnet18, with_options(static_graph=True)),
        row(ddp, "find_unused_parameters", resnet18, with_options(find_unused_parameters=True)),
        row(ddp, "gradient_as_bucket_view", resnet18, with_options(gradient_as_bucket_view=True)),
        row(ddp, "checkpointing of timm, static_graph", resnet18, checkpointed, reference=loop),
        row(ddp, "torch.compile, aot_eager", resnet18, with_options(before=compiled("aot_eager"))),
        timm("hrnet_w18_small", "model(x)"),
        timm(
            "efficientnet_b0",
            "train script: EMA, bf16, channels_last, accumulation",
            timm_loop,
            accumulate=2,
            autocast=True,
            images=8,
            note="bfloat16 rounds as much as synchronization changes: this row shows the rounds only",
        ),
        timm("efficientnet_b0", "train script: EMA, float64, channels_last, accumulation", timm_loop, accumulate=2),
        timm("mobilenetv3_small_100", "model(x)"),
        timm("resnet18", "features_only", features_only=True, loss=sum_of_pyramid),
        row("timm", "resnet18, net.forward_features(x)", pooled_features),
        row(
            "Lightning", "training_step calls self.net(x)", resnet18, partial(lightning_trainer, "part"), reference=loop
        ),
        row("Lightning", "training_step calls self(x)", resnet18, partial(lightning_trainer, "self"), reference=loop),
        row(
            "Lightning",
            "bf16-mixed, accumulate_grad_batches=2",
            resnet18,
            partial(lightning_trainer, "part"),
            reference=loop,
            accumulate=2,
            autocast=True,
            images=8,
            note=BF16,
        ),
        row("Lightning", "Fabric", resnet18, lightning_fabric, reference=loop, note="Fabric returns float32 outputs"),
        row("accelerate", "float64, accumulation", resnet18, accelerator, reference=loop, accumulate=2),
        row(
            "accelerate",
            "mixed_precision bf16",
            resnet18,
            accelerator,
            reference=loop,
            autocast=True,
            images=8,
            note=BF16,
        ),
        row("Hugging Face", "ResNet, labels=", partial(hugging_face, "ResNet"), loss=labelled),
        row("Hugging Face", "MobileNetV2, labels=", partial(hugging_face, "MobileNetV2"), loss=labelled),
        row("Hugging Face", "Segformer, labels=", partial(hugging_face, "Segformer"), loss=labelled, targets=masks),
        row(
            "Hugging Face",
            "Trainer, ResNet",
            partial(hugging_face, "ResNet"),
            hugging_face_trainer,
            reference=loop,
            loss=labelled,
        ),
        row(tv, "RetinaNet with BatchNorm heads, targets", retinanet, loss=detection, targets=boxes),
        row(
            tv,
            "deeplabv3_mobilenet_v3_large, dict of outputs",
            partial(
                torchvision_model, "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, aux_loss=True
            ),
            **seg,
        ),
        row(
            tv,
            "googlenet, auxiliary classifiers",
            partial(torchvision_model, "googlenet", weights=None, init_weights=False),
            loss=three_classifiers,
        ),
        row("FSDP2", "fully_shard of the model", resnet18, partial(fsdp, False), reference=loop),
        row("FSDP2", "fully_shard of stages and model", resnet18, partial(fsdp, True), reference=loop),
        row("MMEngine", "SyncBatchNormRunner", resnet18, mmengine_runner, reference=loop),
        row(
            "GAN",
            "generator and discriminator in turn",
            gan,
            gan_loop,
            reference=gan_loop,
            size=16,
            calls=[{"": (2, 1)}, {"": (3, 3)}],
        ),
        row(
            "BYOL",
            "online and momentum encoder",
            Byol,
            byol_loop,
            reference=byol_loop,
            loss=byol_loss,
            calls=[{"online": two, "predictor": two, "momentum": (2, 0)}],
        ),
    ]
