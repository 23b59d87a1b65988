"""The data-parallel module. It calls the algorithm's hooks around forward, backward and the optimizer's step."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..comm.wire import digest
from ..compat import graph_task, uncompiled, will_run
from .agreement import Agreement, Report
from .bucket import BaguaBucket
from .communication import BaguaProcessGroup, allgather, broadcast, broadcast_object, get_backend, streams
from .env import get_default_bucket_size

__all__ = ["BaguaDistributedDataParallel"]


class BaguaDistributedDataParallel:
    """The data-parallel form of a module. ``with_bagua`` creates it.

    An exception in the step of one rank, caught or not, makes all ranks lose that step and no other. The other ranks
    raise an error that names the rank. All ranks drop the gradients of the step and can continue with the next one.

    Attributes:
        module: the user's module.
        bagua_algorithm: the live algorithm.
        bagua_buckets: the gradient buckets, in the order in which they are sent.
        bagua_train_step_counter: the number of forwards in training mode so far.
        parameters_to_ignore: the names of parameters that are neither broadcast nor communicated.
        require_backward_grad_sync: whether backward communicates gradients. ``False`` accumulates them locally.
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
        self._backward: Optional[int] = None  # the autograd graph task whose gradients are communicated
        self._outstanding: Dict[str, Any] = {}  # parameters whose gradient this backward has not computed yet
        self._in_forward = False  # whether a training forward has begun and not ended
        self._has_gradient = False  # whether this backward has computed a parameter's gradient
        self._participates = False  # whether this backward computes parameters' gradients, now or later
        self._parameter_hooks: List[Any] = []
        self._optimizer_hooks: List[Any] = []
        self._optimizer_steps = 0  # those that have ended, of all optimizers
        previous = module.__dict__.get("bagua_ddp")
        if isinstance(previous, BaguaDistributedDataParallel) and previous.module is module:
            previous._retire()
        communicator = process_group.get_global_communicator()
        self._agreement = (
            Agreement(process_group.host_group(), bagua_module_name, communicator)
            if communicator.nranks() > 1
            else None
        )
        self._module_hooks = [
            module.register_forward_pre_hook(self._before_forward),
            module.register_forward_hook(self._after_forward),
        ]
        self._bagua_init_algorithm()

    def __deepcopy__(self, memo: Dict[int, Any]) -> BaguaDistributedDataParallel:
        return self  # a copied model is not trained: the hooks ignore every module except `self.module`

    # -- parameters -----------------------------------------------------------------------------------------------

    def bagua_build_params(self) -> List[Tuple[str, nn.Parameter]]:
        """Returns the name and the parameter of each gradient to communicate, without duplicates.

        Raises:
            NotImplementedError: if a submodule has sparse gradients.
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

    def _current_accumulators(self) -> List[Tuple[nn.Parameter, Any]]:
        """Returns each parameter with the node that accumulates into its ``grad``; ``None`` if it is frozen.

        The node is another one after the dtype or device of the parameter has changed, even if it has changed back.
        """
        with torch.inference_mode(False), torch.enable_grad():  # else there is no node; the forward may be without
            views: Any = [(p, p.expand_as(p) if p.requires_grad else None) for _, p in self._parameters()]
        return [(p, None if view is None else view.grad_fn.next_functions[0][0]) for p, view in views]

    @uncompiled  # nodes of autograd cannot be part of a graph
    def _parameters_changed(self) -> bool:
        current = self._current_accumulators()
        pairs = zip(current, self._accumulators)
        return len(current) != len(self._accumulators) or any(a is not c or b is not d for (a, b), (c, d) in pairs)

    # -- initialization -------------------------------------------------------------------------------------------

    def _bagua_init_algorithm(self) -> None:
        self._communicated = dict(self.bagua_build_params())
        self._accumulators = self._current_accumulators()
        self._check_same_parameters()
        self._bagua_broadcast_parameters()
        self._bagua_tensors = self.bagua_algorithm.init_tensors(self)
        self._reset_buckets()
        self._register_autograd_hooks()
        self._register_optimizer_hooks()

    def _check_same_parameters(self) -> None:
        """Compares the parameters of all ranks. Runs before any broadcast: gloo aborts the process if lengths differ.

        Raises:
            RuntimeError: on all ranks, if the parameters differ. The message names the first difference.

        Collectives:
            One all-gather. Broadcasts of two ranks' lists if the parameters differ. Every rank must call.
        """
        communicator = self.process_group.get_global_communicator()
        # Frozen ones have no gradients: buckets would have other lengths, at which gloo aborts the process, too.
        kinds = {True: "", False: " frozen"}
        own = [f"{name} {tuple(p.shape)} {p.dtype}{kinds[p.requires_grad]}" for name, p in self._parameters()]
        device = next((p.device for _, p in self._parameters()), torch.device("cpu"))
        digests = torch.empty(communicator.nranks(), dtype=torch.int64, device=device)
        with communicator.explaining("the comparison of parameters", "compare parameters"):
            allgather(torch.tensor([digest("\n".join(own))], device=device), digests, communicator)
        differing = [rank for rank, value in enumerate(digests.tolist()) if value != digests[0]]
        if differing:
            rank = differing[0]
            lists = [broadcast_object(own, src, communicator) for src in (0, rank)]
            pairs = itertools.zip_longest(*lists, fillvalue="no such parameter")
            index, (first, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise RuntimeError(
                f"expected the same parameters on every rank (got {len(lists[0])} on rank 0, {len(lists[1])} on rank "
                f"{rank}; the first difference is parameter {index}: {first} on rank 0, {other} on rank {rank}); build "
                "the same model on every rank"
            )

    def _bagua_broadcast_parameters(self) -> None:
        """Broadcasts the parameters of rank 0, frozen ones included, and the state of its optimizers.

        Collectives:
            One broadcast for each parameter, two for each optimizer. Every rank must call.
        """
        communicator = self.process_group.get_global_communicator()
        for name, parameter in self._parameters():
            with communicator.explaining(f"parameter {name}", "broadcast parameters"):
                broadcast(parameter.detach(), src=0, comm=communicator)
        for optimizer in self.bagua_optimizers:
            is_source = communicator.rank() == 0
            with communicator.explaining(f"the state of {type(optimizer).__name__}", "broadcast the optimizer's state"):
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
        # A weak reference: a native autograd node owns the hook, so gc could not detect the reference cycle.
        self_reference = weakref.ref(self)
        nodes = dict(self._accumulators)
        for name, parameter in self.bagua_build_params():

            def hook(*unused: Any, name: str = name, parameter: nn.Parameter = parameter) -> None:
                ddp = self_reference()
                if ddp is not None:
                    ddp._on_gradient(name, parameter)

            # The node that accumulates into `parameter.grad` runs when the gradient is complete.
            node = nodes[parameter]
            self._parameter_hooks.append(_NodeHook(node.register_hook(hook), node))

    def _register_optimizer_hooks(self) -> None:
        _remove_all(self._optimizer_hooks)
        for optimizer in self.bagua_optimizers:

            def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
                self._optimizer_steps += 1
                self.bagua_algorithm.init_post_optimizer_step_hook(self)(optimizer)

            self._optimizer_hooks.append(optimizer.register_step_post_hook(hook))
            self._optimizer_hooks.append(optimizer.register_step_pre_hook(self._before_optimizer_step))

    def _retire(self) -> None:
        """Ends an interrupted step and removes all hooks, because the module is wrapped again.

        Collectives:
            Those of :meth:`_recover_if_interrupted`; none after ``destroy_process_group``, when no rank can recover.
        """
        if self.process_group.get_global_communicator().exists:
            self._recover_if_interrupted()
        else:
            _open_backwards[:] = [ddp for ddp in _open_backwards if ddp.process_group.get_global_communicator().exists]
        _remove_all(self._module_hooks)
        _remove_all(self._parameter_hooks)
        _remove_all(self._optimizer_hooks)

    # -- a step ---------------------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, input: Any) -> None:
        if module is not self.module:
            return
        if graph_task() == -1:
            self._recover_if_interrupted()
            self._in_forward = module.training
        if module.training:
            self.bagua_train_step_counter += 1
        reset = self.bagua_algorithm.need_reset()
        # A parameter that is frozen, unfrozen, moved, converted, replaced or added changes the buckets and hooks.
        if module.training and (reset or self._parameters_changed()):
            self._bagua_init_algorithm()
        if module.training:
            self.bagua_algorithm.init_forward_pre_hook(self)(input)

    def _after_forward(self, module: nn.Module, input: Any, output: Any) -> None:
        if module is not self.module:
            return
        self._in_forward = False
        if torch.is_grad_enabled():
            for tensor in _output_tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(self._on_output_gradient)

    def _on_output_gradient(self, gradient: Tensor) -> None:
        self._begin_backward()

    def _begin_backward(self) -> None:
        """Queues the callback that ends this backward, once.

        A hook on the module's output calls this method, because the output belongs to the outermost backward. Under
        reentrant checkpointing, a callback queued by a parameter's hook would run at the end of the inner backward,
        before the remaining gradients are computed.
        """
        task = graph_task()
        if not self.require_backward_grad_sync or self._backward == task:
            return
        if self._backward is not None:
            self._recover()
        self._backward = task
        _open_backwards.append(self)
        self._outstanding = dict(self._communicated)
        self._has_gradient = False
        # False for a `torch.autograd.grad` of other tensors, which other ranks need not run.
        self._participates = any(will_run(hook.node) for hook in self._parameter_hooks)
        self._allow_gradient_moves(self.gradient_as_bucket_view and not streams().is_asynchronous)
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _allow_gradient_moves(self, allowed: bool) -> None:
        """Marks the gradients that buckets may move: those that this backward creates. Users may hold earlier ones."""
        for tensor in self._bagua_tensors:
            tensor.bagua_backend_tensor().gradient_may_move = allowed and tensor.is_leaf and tensor.grad is None

    def _on_gradient(self, name: str, parameter: nn.Parameter) -> None:
        if not self.require_backward_grad_sync:
            return
        if self._backward is None:
            self._begin_backward()  # no tensor was found in the module's output, so no hook is on it
        if name not in self._outstanding:
            # The bucket may be in flight. A gradient added now would be lost or sent twice.
            raise RuntimeError(
                f"expected one gradient per backward for {name} (got a second one); checkpoint shared parameters with "
                "use_reentrant=False"
            )
        self._has_gradient = True
        self._outstanding.pop(name)
        self.bagua_algorithm.init_backward_hook(self)(name, parameter)

    def _end_backward(self) -> None:
        try:
            if not self._has_gradient:
                return  # a `torch.autograd.grad` of other tensors must not change the parameters' gradients
            self._mark_outstanding()
            reports = self._report(participates=True, interrupted=False)  # overlaps with the last buckets
            try:
                self.bagua_algorithm.init_post_backward_hook(self)()
            except Exception:
                # On CUDA an exception on another rank may surface here first. The reports identify that rank.
                found: List[Report] = []
                with contextlib.suppress(RuntimeError):  # a rank is lost: the first error has the first place
                    found = reports(False)  # a second description would take as long as the first one
                if any(report.interrupted for report in found):
                    self._finish_step(found)
                raise
            self._finish_step(reports())
        finally:
            self._clear_backward()
            self._allow_gradient_moves(False)

    def _clear_backward(self) -> None:
        self._backward, self._outstanding = None, {}
        if self in _open_backwards:
            _open_backwards.remove(self)

    def _mark_outstanding(self) -> None:
        """Marks parameters without a gradient. Another rank may have one, and its bucket waits for this rank."""
        for name, parameter in self._outstanding.items():
            self.bagua_algorithm.init_backward_hook(self)(name, parameter.bagua_ensure_grad())

    # -- interrupted steps ----------------------------------------------------------------------------------------

    def _recover_if_interrupted(self) -> None:
        """Ends all open backward passes of the process group, and a forward that failed or did not end.

        Must be called outside of a backward pass.
        """
        for ddp in list(_open_backwards):
            if ddp.process_group is self.process_group:  # buckets of all these models share one communicator
                ddp._recover()
        if self._in_forward or self.bagua_algorithm.step_failed:
            self._recover()

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._backward is not None and self._has_gradient and graph_task() == -1:
            raise RuntimeError(
                "expected a complete backward pass before optimizer.step (got one that an exception interrupted, with "
                "incomplete gradients); skip optimizer.step after an exception in backward"
            )

    def _report(self, participates: bool, interrupted: bool) -> Callable[..., List[Report]]:
        counts = self.bagua_algorithm.message_counts()
        if self._agreement is None:  # one rank
            return lambda *unused: [Report(0, 0, 0, 0, participates, interrupted, tuple(counts))]
        reports = self._agreement.report(self._optimizer_steps, participates, interrupted, counts)
        return lambda *describes: self._check_same_model(reports(*describes))

    def _check_same_model(self, reports: List[Report]) -> List[Report]:
        """Returns ``reports``; raises an error if a rank reports a step of another model."""
        if len({report.model for report in reports}) > 1:
            raise RuntimeError(
                f"expected every rank to report a step of {self.bagua_module_name} (got a step of another model); "
                "after an exception, continue with the same model on every rank"
            )
        return reports

    def _finish_step(self, reports: List[Report]) -> None:
        """Ends a backward that raised no exception on this rank.

        Raises:
            RuntimeError: if an exception interrupted the step on another rank, or if the ranks have completed different
                numbers of backward passes or of optimizer steps.
        """
        ranks = self.process_group.ranks
        interrupted = [str(rank) for rank, report in zip(ranks, reports) if report.interrupted]
        if interrupted:
            self.bagua_algorithm.recover([report.counts for report in reports])
            self._drop_gradients()
            raise RuntimeError(
                f"expected backward to end on every rank (got an exception in the step of rank "
                f"{', '.join(interrupted)}); read the error on that rank first. All ranks drop the gradients of this "
                "step and can continue with the next one"
            )
        if len({(report.steps, report.completed) for report in reports}) > 1:
            steps = ", ".join(f"{report.completed} on rank {rank}" for rank, report in zip(ranks, reports))
            raise RuntimeError(
                f"expected the same number of steps without an error on every rank (got {steps}); call with_bagua "
                "again on every rank, which broadcasts the parameters of rank 0"
            )
        if len({report.optimizer_steps for report in reports}) > 1:
            # An exception in optimizer.step that one rank has caught: its parameters are those of an earlier step.
            steps = ", ".join(f"{report.optimizer_steps} on rank {rank}" for rank, report in zip(ranks, reports))
            raise RuntimeError(
                f"expected the same number of optimizer steps on every rank (got {steps} at the end of a backward of "
                f"{self.bagua_module_name}); call with_bagua again on every rank, which broadcasts the parameters of "
                "rank 0, and step the optimizer on all ranks or on none"
            )
        if self._agreement is not None:
            self._agreement.count_completed()

    def _recover(self) -> None:
        """Ends a step that an exception interrupted on this rank, and drops its gradients.

        Collectives:
            One all-gather, and the all-reduces of the buckets that other ranks have sent. The other ranks participate
            at the end of their backward or in this method.
        """
        begun = self._backward is not None
        participates = begun and self._participates
        try:
            notified = self.bagua_algorithm.abort_step(self._in_forward)
            if begun and not participates and not notified:
                return
            reports = self._report(participates, interrupted=True)()
            self._allow_gradient_moves(False)
            if any(report.participates for report in reports):
                self._outstanding = self._outstanding if begun else dict(self._communicated)
                self._mark_outstanding()
            self.bagua_algorithm.recover([report.counts for report in reports])
            if any(report.participates for report in reports):
                self.bagua_algorithm.init_post_backward_hook(self)()
                self._drop_gradients()
        finally:
            self._in_forward = False
            self._clear_backward()
            self._bagua_backend.reset()

    def _drop_gradients(self) -> None:
        for parameter in self._communicated.values():
            parameter.grad = None


# Modules whose backward has begun and not ended. Strong references: recovery must include models that users deleted.
_open_backwards: List[BaguaDistributedDataParallel] = []


class _NodeHook:
    """The handle of a hook, with a reference that keeps its autograd node alive."""

    def __init__(self, handle: Any, node: Any) -> None:
        self._handle, self.node = handle, node

    def remove(self) -> None:
        self._handle.remove()


def _remove_all(hooks: List[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _output_tensors(output: Any) -> Iterator[Tensor]:
    """Yields the tensors in a module's output, which may nest tuples, lists, dictionaries and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _output_tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _output_tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _output_tensors(getattr(output, field.name))


def _group_tensors(tensors: Sequence[Any], limit: int) -> List[List[Any]]:
    """Returns the tensors, in order, in groups of one dtype and at most ``limit`` bytes (or a single larger tensor)."""
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
