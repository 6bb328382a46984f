"""ZeRO-Offload (Ren et al. 2021): optimizer and masters exist once over all ranks, in the host's memory, and stream.

docs/zero.md has a picture of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from distloop.collectives.direct import one_shot
from distloop.errors import ConfigError
from distloop.messages import agree_on
from distloop.strategies.base import Options, Parameters, Strategy
from distloop.strategies.zero_offload.flat import lay_out
from distloop.strategies.zero_offload.gates import Gates
from distloop.strategies.zero_offload.in_words import in_words
from distloop.strategies.zero_offload.links import Direct, Link, link_to
from distloop.strategies.zero_offload.traffic import Traffic
from distloop.strategies.zero_offload.values import Values
from distloop.strategies.zero_offload.worker import Worker
from distloop.transports import Transport

CAPACITY_ON_CPU = 8 * 2**20  # bytes of a bucket, if nothing is said


class ZeroOffload(Strategy):
    """Each rank owns an even cut of every bucket: its sum goes to the host, is applied there, and its values go to all.

    A bucket leaves for its owners as soon as the final backward has completed it; its cut goes down to the host, where
    a thread applies it while backward makes the next ones. New values go up and to all ranks beside the next forward
    pass, in which a module waits for its own. With one rank there is nobody to send to; the rest is the same.

    Args:
        parameters: they become views of flat memory, in ``options.weights`` if that is not None.
        transport: to the other ranks.
        options: ``accumulate="shard"`` sends the gradients of every micro-batch and adds them up where they are
            owned; ``device_fraction`` of the buckets are updated on the device, those that arrive last;
            ``delayed_update`` leaves the values of an update out of the next gradient, so that it may take as long as
            that.
        link: the way between device and host (None: what the parameters' device needs).
    """

    on_host = True
    replicated = False

    def __init__(self, parameters: Parameters, transport: Transport, options: Options, link: Link | None = None):
        super().__init__(parameters, transport)
        device = self._list[0].device
        link = link_to(device) if link is None else link
        self.apart = options.delayed_update or options.weights is not None
        self._delayed, self._on_shard = options.delayed_update, options.accumulate == "shard"
        self.sends_every_backward = self._on_shard
        capacity = options.bucket_bytes(parameters)
        if options.bucket_mb is None and device.type == "cpu":
            capacity = CAPACITY_ON_CPU
        self.buckets = lay_out(parameters, transport, capacity, options.weights)
        self._count = len(self.buckets)
        dtypes = [str(b.flat.dtype).removeprefix("torch.") for b in self.buckets]
        how = "reduce-scatter and all-gather" if transport.size > 1 else "copies to the host and back"
        self.plan = [f"{len(b.flat)} {d} by {how}" for b, d in zip(self.buckets, dtypes, strict=True)]
        self.about = in_words(options)
        agree_on(transport, {"buckets": self.plan}, "how gradients are collected")
        resident = round(options.device_fraction * self._count)
        links = [Direct(device)] * resident + [link] * (self._count - resident)
        wire = torch.bfloat16 if options.wire_dtype == "bf16" else None
        values = Values(self.buckets, links[::-1], delayed=self._delayed)
        self.shards = values.shards
        self._traffic = Traffic(self.buckets, links[::-1], values, transport, wire=wire)
        self._worker = Worker("updating shards")
        self._gates: Gates | None = None
        self._begun = self._ahead = self._sending = False
        self._update: Callable[[], None] = _nothing
        self._steps = 0
        self._null = False  # whether this micro-batch's loss uses no values
        self._stale: frozenset[int] = frozenset()  # buckets that nobody had waited for when backward began
        self._next = 0  # bucket to be sent
        self._missing: list[int] = []  # by bucket: gradients that this backward has not completed yet
        self._sums: dict[nn.Parameter, Tensor] = {}  # of earlier micro-batches, where the model is in half precision
        self._touched: set[nn.Parameter] = set()  # parameters that have a gradient of an earlier micro-batch
        self._places: dict[nn.Parameter, list[int]] = {}
        self._addresses: dict[nn.Parameter, int] = {}
        for i, bucket in enumerate(self.buckets):
            for member in bucket.members:
                self._places.setdefault(member.parameter, []).append(i)
                self._addresses[member.parameter] = member.home.data_ptr()
        self._hooks = [p.register_post_accumulate_grad_hook(self._completed) for p in self._places]

    def watch(self, model: nn.Module) -> None:
        names = {p: name for name, p in self.parameters.items()}
        self._gates = Gates(model, names, self._places, self._traffic.need)

    def look(self) -> AbstractContextManager[object]:
        return nullcontext() if self._gates is None else self._gates.look()

    def ahead(self, update: Callable[[], None]) -> bool:
        if not self.transport.overlaps:
            return False
        self._begin()
        self._ahead = True
        self._update = update
        if not self._on_shard:  # there the sum is complete only after the last rank's last micro-batch
            self._worker.submit(self._traffic.updating(update, streams=not self._delayed))
        return True

    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        for parameter in self._touched:
            if parameter.grad is None:
                raise ConfigError(
                    f"the gradient of parameter {self._name(parameter)!r} was lost between two micro-batches: "
                    "something set it to None (zero_grad()?); distloop clears gradients itself"
                )
        if not self._begun:
            if final or self._on_shard:
                self._begin()
            else:
                self._stale = frozenset(self._traffic.pending)
        if self._null:
            self._stale, self._null = frozenset(), False
        self._sending = final or self._on_shard
        try:
            loss.backward(self.initial_gradient(loss, weight), inputs=self._list)
        finally:
            self._sending = False
        if self._on_shard and not final:
            self._complete_round(more=True)

    def null_loss(self) -> Tensor:
        self._null = True
        return super().null_loss()

    def collect(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        if not self._ahead:
            self._complete_step()
        if self._delayed:
            if not self._on_shard:
                self._traffic.keep()  # the next step may arrive before this one is applied
            self._traffic.publish_all()  # all gradients have arrived, so backward has ended
        yield from self._traffic.arrivals()

    def total(self, amount: Tensor) -> Tensor:
        if self.transport.size == 1:
            return amount
        summed = amount.detach().reshape(1).clone().to(self._list[0].device)
        self._traffic.await_sent()  # all buckets have arrived, and no value leaves before this: it is alone
        one_shot(self.transport, summed)
        return summed.reshape(amount.shape).to(amount.device)

    def broadcast(self, i: int) -> None:
        if not self._delayed:
            self._traffic.publish(i)
        self._traffic.applied(i)

    def settle(self) -> None:
        if self._ahead:
            self._complete_step()
            if self._on_shard:
                self._worker.submit(self._traffic.updating(self._update))
        self._traffic.check()
        self._traffic.open()
        if self._ahead and self._gates is not None:
            self._traffic.need(self._gates.early)
        else:
            self._traffic.complete()
        for parameter in self._list:
            parameter.grad = None
        self._sums.clear()
        self._touched.clear()
        if self._gates is not None:
            self._gates.shut()
        self._begun = False
        self._steps += 1

    def whole(self) -> AbstractContextManager[None]:
        self._traffic.complete()
        if self._delayed and self._steps:
            self._traffic.publish_all()
            self._traffic.open()
            self._traffic.complete()
        return nullcontext()

    def still(self) -> AbstractContextManager[None]:
        self._traffic.complete()
        self._worker.join()
        return nullcontext()

    def resume(self) -> None:
        self._steps = 1  # there is an update that the model may not have had

    def finish(self) -> None:
        self.whole()
        self.close()

    def close(self) -> None:
        if self.transport.busy == self._traffic.quiet:
            self.transport.busy = None
        self._traffic.close()
        self._worker.close()
        for hook in self._hooks:
            hook.remove()
        if self._gates is not None:
            self._gates.close()

    def _begin(self) -> None:
        """Begin to send: nothing of an earlier step or of another learner is under way any more."""
        for parameter, address in self._addresses.items():
            if parameter.data_ptr() != address:
                raise ConfigError(
                    f"parameter {self._name(parameter)!r} no longer lies in its bucket: something gave it other memory "
                    "(model.to(...), parameter.data = ...); copy into it instead, or do that before the training"
                )
        transport, self._stale = self.transport, frozenset(self._traffic.pending)
        if transport.busy is not None and transport.busy != self._traffic.quiet:
            transport.busy()
        transport.busy = self._traffic.quiet
        if not self._delayed:
            self._worker.join()
        self._traffic.begin()
        self._missing = [len(bucket.members) for bucket in self.buckets]
        self._next, self._begun = 0, True

    def _completed(self, parameter: Tensor) -> None:
        """Note that backward has added its last to a parameter's gradient; send what can be sent."""
        assert isinstance(parameter, nn.Parameter)
        if self._stale and self._gates is not None:
            self._gates.check(parameter, self._stale)
        if not self._sending:
            self._keep(parameter)
            return
        places = self._places[parameter]
        if self._next > places[0]:
            raise ConfigError(
                f"step {self._steps + 1}: the gradient of {self._name(parameter)!r} grew after it had left: backward "
                "added to it in several goes, as a backward inside backward does; make the loss without that"
            )
        for i in places:
            self._missing[i] -= 1
        while self._next < self._count and self._missing[self._next] <= 0:
            self._send_next()

    def _keep(self, parameter: nn.Parameter) -> None:
        """Add up what micro-batches before the final one give: in single precision, if the model is in less."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.dtype.itemsize >= 4:
            self._touched.add(parameter)
            return
        if parameter in self._sums:
            self._sums[parameter] += gradient
        else:
            self._sums[parameter] = gradient.float()
        parameter.grad = None

    def _send_next(self) -> None:
        i, bucket = self._next, self.buckets[self._next]
        exact = self._on_shard or any(member.parameter in self._sums for member in bucket.members)
        bucket.fill(self._traffic.buffer(i, summed=exact), self._sums)
        self._next += 1
        for member in bucket.members:
            if member.stop == member.parameter.numel():
                member.parameter.grad = None
                self._sums.pop(member.parameter, None)
        self._traffic.bring(i)

    def _send_rest(self) -> None:
        """Send what no backward has completed: zeros, where no loss has reached."""
        while self._next < self._count:
            self._send_next()

    def _complete_step(self) -> None:
        """Send the rest; if every micro-batch is sent, take part in those that other ranks still have."""
        self._touched.clear()
        self._send_rest()
        while self._on_shard and self._complete_round(more=False):
            self._begin()
            self._send_rest()

    def _complete_round(self, *, more: bool) -> bool:
        """Add a micro-batch's gradients up where they are owned; return whether any rank has more."""
        self._send_rest()
        self._traffic.keep()
        self._begun = False
        return bool(self.total(torch.tensor(float(more))))

    def _name(self, parameter: nn.Parameter) -> str:
        return next(name for name, p in self.parameters.items() if p is parameter)


def _nothing() -> None: ...
