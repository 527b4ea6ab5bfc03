"""The student: a copy of the full-precision model whose quantized weights are put in from the rounding variables.

Full precision stays untouched as the teacher. Parameters that are not quantized (norms, biases) are shared by both. Each
gradient is used as soon as it is complete and freed at once, so that no more than one parameter's gradient is alive.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qguard_edge.learned.devices import place
from qguard_edge.learned.parts import MatrixPart
from qguard_edge.learned.variables import SignSteps

OnSlope = Callable[[int, Tensor], None]
"""Called with a part's index and the derivative of the loss by its weights, f32 `[rows, columns]`."""


class Student:
    """See the module docstring.

    Args:
        teacher: full precision; not modified.
        parts: what is quantized.
        checkpointing: recompute activations in the backward pass.
        devices: where to spread the copy; empty: where the teacher is.
    """

    def __init__(
        self, teacher: Any, parts: Sequence[MatrixPart], *, checkpointing: bool = False, devices: Sequence[torch.device] = ()
    ) -> None:
        self.parts = parts
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        names = {part.source.parameter for part in parts}
        shared = {id(p): p for name, p in teacher.named_parameters() if name not in names}
        self.model = copy.deepcopy(teacher, shared)  # a memo that maps shared parameters to themselves
        if devices:
            place(self.model, devices)
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.by_parameter: dict[str, list[int]] = {}
        for index, part in enumerate(parts):
            self.by_parameter.setdefault(part.source.parameter, []).append(index)
            self.parameters[part.source.parameter].requires_grad_(True)
        if checkpointing:
            _recompute(self.model)

    @torch.no_grad()
    def load(self, index: int, values: Tensor) -> None:
        """Put a part's weights into the model."""
        part = self.parts[index]
        part.scatter(values.float(), self.parameters[part.source.parameter])

    def device_of(self, index: int) -> torch.device:
        """Where a part's parameter is."""
        return self.parameters[self.parts[index].source.parameter].device

    def load_all(self, variables: Sequence[SignSteps]) -> None:
        """Put every part's present values into the model."""
        for index, one in enumerate(variables):
            self.load(index, one.values())

    def on_gradients(self, receive: OnSlope) -> list[Any]:
        """Hand each parameter's gradient to `receive`, part by part, and free it; returns handles to remove."""

        def hook(name: str) -> Callable[[Tensor], None]:
            def take(parameter: Tensor) -> None:
                gradient = parameter.grad
                parameter.grad = None
                assert gradient is not None
                for index in self.by_parameter[name]:
                    receive(index, self.parts[index].gather(gradient).float())

            return take

        return [self.parameters[name].register_post_accumulate_grad_hook(hook(name)) for name in self.by_parameter]


def _recompute(model: Any) -> None:
    """Gradient checkpointing works in training mode only; take the randomness out of that mode."""
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
