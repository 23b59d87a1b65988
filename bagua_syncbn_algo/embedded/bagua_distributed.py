"""The data-parallel module: calls the algorithm's hooks around forward, backward and the optimizer's step."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..comm.wire import digest
from ..compat import graph_task, will_run
from .agreement import Agreement, Report
from .bucket import BaguaBucket
from .communication import BaguaProcessGroup, allgather, broadcast, broadcast_object, get_backend, streams
from .env import get_default_bucket_size

__all__ = ["BaguaDistributedDataParallel"]


class BaguaDistributedDataParallel:
    """Trains ``module`` with ``algorithm``; made by ``with_bagua``.

    An exception in one rank's step, caught or not, costs that step on every rank, and no more: the other ranks raise an
    error that names the rank, all ranks drop the gradients of the step, and the next one is in step again.

    Attributes:
        module: the user's module.
        bagua_algorithm: the live algorithm.
        bagua_buckets: the gradient buckets, in the order in which they are sent.
        bagua_train_step_counter: forwards in training mode so far.
        parameters_to_ignore: names that are neither broadcast nor communicated.
        require_backward_grad_sync: whether backward communicates; turn off to accumulate gradients locally.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        algorithm: Any,
        process_group: BaguaProcessGroup,
        bagua_module_name: str,
        gradient_as_bucket_view: bool = True,
    ) -> None:
        self.module = module
        self.bagua_optimizers = list(optimizers)
        self.process_group = process_group
        self.bagua_module_name = bagua_module_name
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.bagua_algorithm = algorithm.reify(process_group)
        self.bagua_buckets: List[BaguaBucket] = []
        self.bagua_train_step_counter = 0
        self.require_backward_grad_sync = True
        self.parameters_to_ignore: List[str] = [
            *getattr(module, "_bagua_params_and_buffers_to_ignore", []),
            *getattr(module, "_ddp_params_and_buffers_to_ignore", []),
        ]
        self._bagua_backend = get_backend(bagua_module_name)
        self._backward: Optional[int] = None  # the autograd graph task whose gradients are being gathered
        self._outstanding: Dict[str, Any] = {}  # parameters whose gradient this backward has not given yet
        self._in_forward = False  # whether a training forward has begun and not ended
        self._took_part = False  # whether this backward has given any gradient
        self._takes_part = False  # whether it has or will
        self._parameter_hooks: List[Any] = []
        self._optimizer_hooks: List[Any] = []
        previous = module.__dict__.get("bagua_ddp")
        if isinstance(previous, BaguaDistributedDataParallel) and previous.module is module:
            previous._recover_if_broken_off()
            previous._remove_hooks()
        communicator = process_group.get_global_communicator()
        self._agreement = (
            Agreement(process_group.host_group(), bagua_module_name) if communicator.nranks() > 1 else None
        )
        self._module_hooks = [
            module.register_forward_pre_hook(self._before_forward),
            module.register_forward_hook(self._after_forward),
        ]
        self._bagua_init_algorithm()

    def __deepcopy__(self, memo: Dict[int, Any]) -> BaguaDistributedDataParallel:
        return self  # a copy of the model (an averaged one, say) is not trained by it: see the hooks' first line

    # -- description ----------------------------------------------------------------------------------------------

    def bagua_build_params(self) -> List[Tuple[str, nn.Parameter]]:
        """Returns name and parameter of all that are communicated, each once.

        Raises:
            NotImplementedError: for a module with sparse gradients.
        """
        for name, part in self.module.named_modules():
            if getattr(part, "sparse", False) and isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
                raise NotImplementedError(
                    f"expected dense gradients (got sparse=True at {name or type(part).__name__}); use sparse=False"
                )
        return [(name, parameter) for name, parameter in self._parameters() if parameter.requires_grad]

    def _parameters(self) -> List[Tuple[str, nn.Parameter]]:
        ignored = set(self.parameters_to_ignore)
        return [(name, p) for name, p in self.module.named_parameters() if name not in ignored]

    # -- going live -----------------------------------------------------------------------------------------------

    def _bagua_init_algorithm(self) -> None:
        self._registered = dict(self.bagua_build_params())
        self._watched = [(p, p.requires_grad) for _, p in self._parameters()]
        self._refuse_different_models()
        self._bagua_broadcast_parameters()
        self._bagua_tensors = self.bagua_algorithm.init_tensors(self)
        self._reset_buckets()
        self._register_autograd_hooks()
        self._register_optimizer_hooks()

    def _refuse_different_models(self) -> None:
        """Compares the ranks' parameters before anything is broadcast: a length that differs ends the process in gloo.

        Raises:
            RuntimeError: if they differ; names the first difference. All ranks raise.
        """
        communicator = self.process_group.get_global_communicator()
        mine = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in self._parameters()]
        device = next((p.device for _, p in self._parameters()), torch.device("cpu"))
        digests = torch.empty(communicator.nranks(), dtype=torch.int64, device=device)
        allgather(torch.tensor([digest("\n".join(mine))], device=device), digests, communicator)
        differing = [rank for rank, other in enumerate(digests.tolist()) if other != digests[0]]
        if differing:
            rank = differing[0]
            lists = [broadcast_object(mine, src, communicator) for src in (0, rank)]
            pairs = itertools.zip_longest(*lists, fillvalue="no such parameter")
            index, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise RuntimeError(
                f"expected the same parameters on every rank (got {len(lists[0])} on rank 0, {len(lists[1])} on rank "
                f"{rank}; the first difference is parameter {index}: {ours} on rank 0, {theirs} on rank {rank}); build "
                "the same model on every rank"
            )

    def _bagua_broadcast_parameters(self) -> None:
        """Gives every rank the parameters, frozen ones too, and the optimizer state of rank 0."""
        communicator = self.process_group.get_global_communicator()
        for _, parameter in self._parameters():
            broadcast(parameter.detach(), src=0, comm=communicator)
        for optimizer in self.bagua_optimizers:
            is_source = communicator.rank() == 0
            state = broadcast_object(optimizer.state_dict() if is_source else None, src=0, comm=communicator)
            if not is_source:
                optimizer.load_state_dict(state)

    def _reset_buckets(self) -> None:
        groups = _group_tensors(self._bagua_tensors, get_default_bucket_size())
        self.bagua_buckets = self.bagua_algorithm.tensors_to_buckets(groups, self.gradient_as_bucket_view)
        for bucket in self.bagua_buckets:
            self.bagua_algorithm.init_operations(self, bucket)
        self._bagua_backend.register_ordered_buckets([bucket.backend_bucket for bucket in self.bagua_buckets])

    def _register_autograd_hooks(self) -> None:
        _remove_all(self._parameter_hooks)
        # Weakly: the hook lives in a native node, through which the garbage collector cannot see the circle.
        this = weakref.ref(self)
        for name, parameter in self.bagua_build_params():

            def hook(*unused: Any, name: str = name, parameter: nn.Parameter = parameter) -> None:
                ddp = this()
                if ddp is not None:
                    ddp._on_gradient(name, parameter)

            # On the node that accumulates into `parameter.grad`: runs when the gradient is complete.
            node: Any = parameter.expand_as(parameter).grad_fn
            accumulator = node.next_functions[0][0]
            handle = accumulator.register_hook(hook)
            self._parameter_hooks.append(_Kept(handle, accumulator))

    def _register_optimizer_hooks(self) -> None:
        _remove_all(self._optimizer_hooks)
        for optimizer in self.bagua_optimizers:

            def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
                self.bagua_algorithm.init_post_optimizer_step_hook(self)(optimizer)

            self._optimizer_hooks.append(optimizer.register_step_post_hook(hook))
            self._optimizer_hooks.append(optimizer.register_step_pre_hook(self._before_optimizer_step))

    def _remove_hooks(self) -> None:
        _remove_all(self._module_hooks)
        _remove_all(self._parameter_hooks)
        _remove_all(self._optimizer_hooks)

    # -- a step ---------------------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, input: Any) -> None:
        if module is not self.module:
            return
        if graph_task() == -1:
            self._recover_if_broken_off()
            self._in_forward = module.training
        if module.training:
            self.bagua_train_step_counter += 1
        reset = self.bagua_algorithm.need_reset()
        # A parameter that was frozen or thawed since belongs to other buckets than before.
        if module.training and (reset or any(p.requires_grad != before for p, before in self._watched)):
            self._bagua_init_algorithm()
        if module.training:
            self.bagua_algorithm.init_forward_pre_hook(self)(input)

    def _after_forward(self, module: nn.Module, input: Any, output: Any) -> None:
        if module is not self.module:
            return
        self._in_forward = False
        if torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(self._on_output_gradient)

    def _on_output_gradient(self, gradient: Tensor) -> None:
        self._begin_backward()

    def _begin_backward(self) -> None:
        """Arranges for the end of this backward, once.

        From the gradient of the module's output, because that belongs to the outermost backward: a callback queued by a
        parameter under reentrant checkpointing would run at the end of the inner one, before other gradients are there.
        """
        task = graph_task()
        if not self.require_backward_grad_sync or self._backward == task:
            return
        if self._backward is not None:
            self._recover()
        self._backward = task
        _begun.append(self)
        self._outstanding = dict(self._registered)
        self._took_part = False
        # Not where it is `torch.autograd.grad` for something else: other ranks hear nothing of that.
        self._takes_part = any(will_run(kept.node) for kept in self._parameter_hooks)
        self._note_new_gradients(self.gradient_as_bucket_view and not streams().is_asynchronous)
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _note_new_gradients(self, noted: bool) -> None:
        """Tells the buckets which gradients may move: one that is there now, before backward, the user may hold."""
        for tensor in self._bagua_tensors:
            tensor.bagua_backend_tensor().gradient_is_new = noted and tensor.is_leaf and tensor.grad is None

    def _on_gradient(self, name: str, parameter: nn.Parameter) -> None:
        if not self.require_backward_grad_sync:
            return
        if self._backward is None:
            self._begin_backward()  # the module's output held no tensor that was found
        if name not in self._outstanding:
            # Its bucket may be on its way: what is added to it now would be lost, or sent twice.
            raise RuntimeError(
                f"expected one gradient a backward for {name} (got a second one); checkpoint shared parameters with "
                "use_reentrant=False"
            )
        self._took_part = True
        self._outstanding.pop(name)
        self.bagua_algorithm.init_backward_hook(self)(name, parameter)

    def _end_backward(self) -> None:
        try:
            if not self._took_part:
                return  # `torch.autograd.grad` for something else: it must leave the parameters' gradients alone
            self._mark_outstanding()
            reports = self._report(True, False)  # travels beside the last buckets
            try:
                self.bagua_algorithm.init_post_backward_hook(self)()
            except Exception:
                # On CUDA the error of a rank that broke off may surface here. Its report waits for this rank.
                found = reports()
                if any(report.broken_off for report in found):
                    self._conclude(found)
                raise
            self._conclude(reports())
        finally:
            self._leave_backward()
            self._note_new_gradients(False)

    def _leave_backward(self) -> None:
        self._backward, self._outstanding = None, {}
        if self in _begun:
            _begun.remove(self)

    def _mark_outstanding(self) -> None:
        """Marks what has no gradient: it may have one on another rank, whose bucket waits for this one."""
        for name, parameter in self._outstanding.items():
            self.bagua_algorithm.init_backward_hook(self)(name, parameter.bagua_ensure_grad())

    # -- a step that an exception broke off -----------------------------------------------------------------------

    def _recover_if_broken_off(self) -> None:
        """Outside of a backward pass: ends every one that has begun, and a forward that did not end or failed."""
        for ddp in list(_begun):
            if ddp.process_group is self.process_group:  # other models' buckets travel on the same communicator
                ddp._recover()
        if self._in_forward or self.bagua_algorithm.step_failed:
            self._recover()

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._backward is not None and self._took_part and graph_task() == -1:
            raise RuntimeError(
                "expected the backward pass before optimizer.step to have ended (got one that an exception broke off, "
                "whose gradients are incomplete); skip the optimizer's step where backward raises"
            )

    def _report(self, took_part: bool, broken_off: bool) -> Callable[[], List[Report]]:
        counts = self.bagua_algorithm.communication_counts()
        if self._agreement is None:  # one rank
            return lambda: [Report(0, 0, 0, took_part, broken_off, tuple(counts))]
        reports = self._agreement.report(took_part, broken_off, counts)
        return lambda: self._same_model(reports())

    def _same_model(self, reports: List[Report]) -> List[Report]:
        """Returns ``reports``, which must be of this model's step on every rank."""
        if len({report.model for report in reports}) > 1:
            raise RuntimeError(
                f"expected every rank to report a step of {self.bagua_module_name} (got one of another model); after "
                "an exception, go on with the same model on every rank"
            )
        return reports

    def _conclude(self, reports: List[Report]) -> None:
        """Ends a backward that was well on this rank.

        Raises:
            RuntimeError: if it was not on another one, on all ranks that have not raised an error yet.
        """
        ranks = self.process_group.ranks
        broken = [str(rank) for rank, report in zip(ranks, reports) if report.broken_off]
        if broken:
            self.bagua_algorithm.recover([report.counts for report in reports])
            self._drop_gradients()
            raise RuntimeError(
                f"expected backward to end on every rank (got an exception in the step of rank {', '.join(broken)}); "
                "look at that rank's own error first. The gradients of this step are dropped on every rank, and the "
                "next step is in step again"
            )
        if len({(report.steps, report.ended) for report in reports}) > 1:
            steps = ", ".join(f"{report.ended} on rank {rank}" for rank, report in zip(ranks, reports))
            raise RuntimeError(
                f"expected every rank to have ended as many steps without an error (got {steps}), so that their "
                "parameters are the same; call with_bagua again on every rank, which gives all of them rank 0's"
            )
        if self._agreement is not None:
            self._agreement.end_well()

    def _recover(self) -> None:
        """Ends a step that an exception broke off on this rank: sends what other ranks wait for, drops the gradients.

        Collectives:
            One all-gather, and the buckets that other ranks have sent. They take part at the end of their backward, or
            here as well.
        """
        begun, took_part = self._backward is not None, self._takes_part and self._backward is not None
        try:
            told = self.bagua_algorithm.leave_step(self._in_forward)
            if begun and not took_part and not told:
                return
            reports = self._report(took_part, True)()
            self._note_new_gradients(False)
            if any(report.took_part for report in reports):
                self._outstanding = self._outstanding if begun else dict(self._registered)
                self._mark_outstanding()
            self.bagua_algorithm.recover([report.counts for report in reports])
            if any(report.took_part for report in reports):
                self.bagua_algorithm.init_post_backward_hook(self)()
                self._drop_gradients()
        finally:
            self._in_forward = False
            self._leave_backward()
            self._bagua_backend.reset()

    def _drop_gradients(self) -> None:
        for parameter in self._registered.values():
            parameter.grad = None


# Those whose backward has begun and not ended. Held, so that every rank still knows of a model that it has given up.
_begun: List[BaguaDistributedDataParallel] = []


class _Kept:
    """A hook's handle, with the autograd node that would otherwise be collected."""

    def __init__(self, handle: Any, node: Any) -> None:
        self._handle, self.node = handle, node

    def remove(self) -> None:
        self._handle.remove()


def _remove_all(hooks: List[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yields the tensors in a module's output: nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))


def _group_tensors(tensors: Sequence[Any], limit: int) -> List[List[Any]]:
    """Groups tensors, in order, by dtype and into buckets of at most ``limit`` bytes (one tensor at least)."""
    open_groups: Dict[torch.dtype, List[Any]] = {}
    sizes: Dict[torch.dtype, int] = {}
    groups: List[List[Any]] = []
    for tensor in tensors:
        effective = tensor.bagua_getter_closure()
        dtype, size = effective.dtype, effective.numel() * effective.element_size()
        if dtype not in open_groups or sizes[dtype] + size > limit:
            open_groups[dtype] = []
            sizes[dtype] = 0
            groups.append(open_groups[dtype])
        open_groups[dtype].append(tensor)
        sizes[dtype] += size
    return groups
