"""A policy: megatron-core's model, its optimizer and the passes that alignment needs, the same on CPU and GPU.

Legend: B rows, N sequences, R scored tokens of a sequence, S tokens of a row, W tokens with a logit.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemotron_launch.trainer.architecture import Architecture
from nemotron_launch.trainer.batch import Batch, wanted_positions
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.megatron.attention import PLANS, AttentionPlan, RotaryTable
from nemotron_launch.trainer.megatron.logprobs import keep_likeliest, mask_padding, token_logps
from nemotron_launch.trainer.megatron.model import Numerics, build_model, unwrap
from nemotron_launch.trainer.megatron.optimizer import build_optimizer, reduce_gradients
from nemotron_launch.trainer.megatron.parallel import Layout
from nemotron_launch.trainer.rollouts import Sampling

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

# (logps [N, R] of micro-batch i, i) → the loss, already divided by the global batch, and metrics that add up.
LossFunction = Callable[[Tensor, int], tuple[Tensor, dict[str, Tensor]]]
EXTREMES = ("_min", "_max")  # metrics with such names are reduced to the least or greatest value


class Policy:
    """A model placed on this rank. Frozen until `make_trainable`; then `train_step` updates it."""

    def __init__(self, architecture: Architecture, layout: Layout, numerics: Numerics, *, seed: int = 0) -> None:
        self.architecture = architecture
        self.layout = layout
        self.numerics = numerics
        self.model: Any = build_model(architecture, layout, numerics, seed=seed)
        self.model.requires_grad_(False).eval()
        self.gpt = unwrap(self.model)
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.rotary = RotaryTable(
            head_dim=architecture.head_dim,
            theta=architecture.rope_theta,
            scaling=architecture.rope_scaling,
            max_positions=architecture.max_position_embeddings,
            device=layout.device,
            dtype=numerics.dtype,
        )

    def make_trainable(self, megatron_section: Mapping[str, Any], *, total_steps: int) -> None:
        """Add gradient buffers, optimizer and schedule as `policy.megatron_cfg` says; load weights before this."""
        self.gpt.requires_grad_(True).train()
        self.model = reduce_gradients(self.gpt, self.layout, megatron_section)
        self.optimizer, self.scheduler = build_optimizer(
            self.model, self.layout, megatron_section, total_steps=total_steps
        )

    # -- passes ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logps(self, batches: Sequence[Batch], sampling: Sampling | None = None) -> list[Tensor]:
        """Log-probabilities [N, R] of every micro-batch's masked tail tokens, fp32, 0 elsewhere, on every stage.

        sampling: of whose distribution (None: the model's own, as at temperature 1). A token that top_p or top_k would
        leave out is scored as if it had been kept; of the policy's own samples none is.
        """
        with self._evaluating():
            results = self._run(batches, None, sampling)
        if not self.layout.last_stage:
            results = [torch.zeros_like(batch.mask_NR) for batch in batches]
        return [parallel.from_last_stage(logps) for logps in results]

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Logits [W, V] behind every token that predicts one of the batch's, in its dtype, on all of its ranks."""
        seen: list[Tensor] = []
        hook = None
        if self.layout.last_stage:
            hook = self.gpt.output_layer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        try:
            with self._evaluating():
                self._run([batch], None)
        finally:
            if hook is not None:
                hook.remove()
        count = len(wanted_positions(batch)[0])
        shape = count, self.architecture.vocab_size
        rows = torch.zeros(shape, dtype=self.numerics.dtype, device=self.layout.device)
        if self.layout.last_stage:
            whole = gather_from_tensor_model_parallel_region(seen[0][:, 0].contiguous())
            rows.copy_(whole[:, : self.architecture.vocab_size])
        return parallel.from_last_stage(rows)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The model in evaluation mode; switching walks through all its modules, so only where it is not."""
        was_training = self.gpt.training
        if was_training:
            self.gpt.eval()
        try:
            yield
        finally:
            if was_training:
                self.gpt.train()

    def train_step(
        self,
        batches: Sequence[Batch],
        loss: LossFunction,
        metric_names: Sequence[str],
        sampling: Sampling | None = None,
        *,
        tick: bool = True,
    ) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches; metrics summed over micro-batches and data parallelism.

        sampling: as in `logps`. Where it filters, the loss is given [2, N, R]: the log-probabilities in the filtered
        distribution, and those in the whole one, of which a KL to the reference must be taken (as NeMo-RL does).
        tick: whether the schedule moves on; as in NeMo-RL it does once for all updates on the same rollouts.
        Adds grad_norm (before clipping), lr and wd. Does not judge whether they are finite.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        collected = self._run(batches, loss, sampling)
        metrics = self.reduce(collected, metric_names)
        group = self.optimizer.param_groups[0]
        metrics |= {"lr": group["lr"], "wd": group["weight_decay"]}
        if math.isfinite(metrics["loss"]):  # a bad loss must not reach the weights
            _, grad_norm, _ = self.optimizer.step()
            metrics["grad_norm"] = float(grad_norm) if grad_norm is not None else 0.0
        else:
            metrics["grad_norm"] = math.nan
        if tick:
            self.scheduler.step(1)
        return metrics

    def evaluate(self, batches: Sequence[Batch], loss: LossFunction, metric_names: Sequence[str]) -> dict[str, float]:
        """The loss's metrics without a step, summed as in `train_step`."""
        collected = [loss(logps, i)[1] for i, logps in enumerate(self.logps(batches))]
        return self.reduce(collected if self.layout.last_stage else [], metric_names)

    def reduce(self, collected: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, float]:
        """Metrics over micro-batches and data-parallel ranks; every stage gets the last stage's.

        Names in _min and _max are extremes, all others add up. An extreme of nothing is NaN.
        """
        signs = [-1.0 if name.endswith("_min") else 1.0 for name in names if name.endswith(EXTREMES)]
        ordered = sorted(names, key=lambda name: name.endswith(EXTREMES))
        count = len(names) - len(signs)
        totals = torch.zeros(count, dtype=torch.float64, device=self.layout.device)
        peaks = torch.full((len(signs),), -torch.inf, dtype=torch.float64, device=self.layout.device)
        if self.layout.last_stage:
            for metrics in collected:
                values = torch.stack([metrics[name].to(totals) for name in ordered])
                totals += values[:count]
                peaks = torch.maximum(peaks, values[count:] * peaks.new_tensor(signs))
        parallel.from_last_stage(parallel.sum_over_data(totals))
        if not signs:
            return dict(zip(ordered, totals.tolist(), strict=True))
        parallel.from_last_stage(parallel.max_over_data(peaks))
        found = [
            sign * peak if math.isfinite(peak) else math.nan for sign, peak in zip(signs, peaks.tolist(), strict=True)
        ]
        return dict(zip(ordered, [*totals.tolist(), *found], strict=True))

    def _run(self, batches: Sequence[Batch], loss: LossFunction | None, sampling: Sampling | None = None) -> list[Any]:
        """Megatron's schedule over the micro-batches: with a loss forward and backward, else log-probabilities."""
        no_tokens = torch.zeros((), dtype=torch.int, device=self.layout.device)

        def forward_step(iterator: Iterator[tuple[int, Batch]], model: torch.nn.Module) -> tuple[Tensor, Any]:
            index, batch = next(iterator)
            output = self._forward(model, batch, sampling, both=loss is not None)

            def finish(logps_NR: Tensor, non_loss_data: bool = False) -> Any:
                if loss is None:
                    return logps_NR
                value, metrics = loss(logps_NR, index)
                return value, no_tokens, metrics  # 0 tokens: the loss is already normalised

            return output, finish

        longest = max(batches, key=lambda batch: batch.tokens_BS.shape[1])
        try:
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(enumerate(batches)),
                model=self.model,
                num_microbatches=len(batches),
                seq_length=longest.tokens_BS.shape[1],
                micro_batch_size=longest.rows,
                forward_only=loss is None,
                collect_non_loss_data=loss is None,
            )
        finally:
            PLANS.clear()

    def _forward(self, model: torch.nn.Module, batch: Batch, sampling: Sampling | None, *, both: bool) -> Tensor:
        """The last stage's log-probabilities [N, R], or another stage's hidden states.

        both: with a sampling that filters, [2, N, R] as `train_step` says.
        """
        places_W, index_W = wanted_positions(batch)
        plan = self.plan(batch)
        if self.layout.last_stage:
            # Under sequence parallelism each rank has other tokens until the output layer gathers them.
            late = self.layout.sequence_parallel
            plan.wanted_W, self.gpt.output_layer.wanted_N = (None, places_W) if late else (places_W, None)
        output = model(batch.tokens_BS, None, PLANS.register(plan))
        if not self.layout.last_stage:
            return output
        targets_W = batch.tails_NR.flatten()[index_W]

        def placed(logps_W: Tensor) -> Tensor:
            flat = torch.zeros(batch.mask_NR.numel(), device=logps_W.device).index_copy(0, index_W, logps_W)
            return flat.view_as(batch.mask_NR)

        logps_NR = placed(self.target_logps(output.squeeze(0), targets_W, sampling))
        if both and sampling is not None and sampling.filters:
            return torch.stack([logps_NR, placed(self.target_logps(output.squeeze(0), targets_W, sampling.whole))])
        return logps_NR

    def plan(self, batch: Batch) -> AttentionPlan:
        """Where the batch's tokens stand and what each may see."""
        cos, sin = self.rotary.at(batch.positions_BS.T, batch.longest)
        mask_BP = None
        if batch.padded_prompts:
            places = torch.arange(batch.prompt, device=batch.tokens_BS.device)
            mask_BP = places >= batch.prompt_lens_B[:, None]
        return AttentionPlan(batch.prompt, batch.tails, batch.tail, cos, sin, mask_BP)

    def target_logps(self, logits_Wv: Tensor, targets_W: Tensor, sampling: Sampling | None = None) -> Tensor:
        """log softmax(logits)[target], [W], over the whole vocabulary without its padding, or as `sampling` filters."""
        group = parallel_state.get_tensor_model_parallel_group()
        first = self.layout.tensor_rank * logits_Wv.shape[1]
        logits_Wv = mask_padding(logits_Wv, first=first, vocab_size=self.architecture.vocab_size)
        if sampling is not None and sampling.temperature not in (0, 1):
            logits_Wv = logits_Wv.float() / sampling.temperature
        if sampling is not None and sampling.filters:
            logits_Wv = keep_likeliest(
                logits_Wv, targets_W, top_p=sampling.top_p, top_k=sampling.top_k, first=first, group=group
            )
        return token_logps(logits_Wv, targets_W, first=first, group=group)

    # -- weights -----------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """A copy of this rank's parameters in host memory."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self.gpt.named_parameters()}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self.gpt.named_parameters():
            value.copy_(weights[name])

    @contextlib.contextmanager
    def other_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Compute with other weights for a while, such as the reference's; nothing may train meanwhile."""
        own = self.weights()
        self.set_weights(weights)
        try:
            yield
        finally:
            self.set_weights(own)
