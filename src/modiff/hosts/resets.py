"""Follow diffusers' resets: at the end of almost every pipeline call, components forget what they remember."""

from __future__ import annotations

import types

from torch import nn

from modiff.model.attach import attachment_of

_NAME = "_reset_stateful_cache"


def follow_resets(model: nn.Module) -> None:
    """Let the end of a pipeline call end a trajectory that began by itself."""
    own = getattr(type(model), _NAME, None)

    def reset(self: nn.Module, recurse: bool = True) -> None:
        attachment = attachment_of(self)
        if attachment is not None and attachment.automatic is not None:
            attachment.automatic.end()
        if own is not None:
            own(self, recurse)

    model.__dict__[_NAME] = types.MethodType(reset, model)  # copy.deepcopy binds it to the copy
