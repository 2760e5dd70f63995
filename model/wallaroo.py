"""The whole model: decoder, vision tower, image tokenizer, heads and adapters as one module.

Parameter names follow Hugging Face's Qwen2.5-VL below `language_model` and `visual`. Knows nothing of
how tokens are scheduled or sampled.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wallaroo.model.config import TASKS, ModelConfig
from wallaroo.model.decoder import Decoder
from wallaroo.model.vq import VQModel

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel


def adapter(codebook_dim: int, hidden: int) -> nn.Sequential:
    """Makes an adapter from codebook vectors `(..., codebook_dim)` to decoder inputs `(..., H)`.

    Args:
        codebook_dim: Numbers of a vector.
        hidden: H.

    Returns:
        Two linear layers with a GELU between them.
    """
    return nn.Sequential(nn.Linear(codebook_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))


def image_head(hidden: int, codebook_size: int) -> nn.Sequential:
    """Makes a head from hidden states `(..., H)` to logits over the codebook `(..., C)`.

    Args:
        hidden: H.
        codebook_size: C.

    Returns:
        Two linear layers with a GELU between them, the second without bias.
    """
    return nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, codebook_size, bias=False))


class Wallaroo(nn.Module):
    """The parts of the model that some tasks need; the others are None.

    Args:
        config: Of the checkpoint.
        tasks: All of the checkpoint's by default.

    Raises:
        InputError: The checkpoint cannot do a task.
    """

    def __init__(self, config: ModelConfig, tasks: tuple[str, ...] | None = None):
        super().__init__()
        tasks = config.tasks if tasks is None else tasks
        for task in tasks:
            config.require_task(task)
        generates, edits, understands = (task in tasks for task in TASKS)
        hidden, vq = config.decoder.hidden_size, config.vq
        self.config = config
        self.tasks = tasks
        self.language_model = Decoder(config.decoder)
        self.lm_head = nn.Linear(hidden, config.decoder.vocab_size, bias=False) if understands else None
        self.visual: Qwen2_5_VisionTransformerPretrainedModel | None = None
        if edits or understands:
            from wallaroo.model.vision import vision_tower

            self.visual = vision_tower(config.vision)
        self.vq = VQModel(config.vq) if generates or edits else None
        self.gen_input_adapter = adapter(vq.codebook_dim, hidden) if generates else None
        self.gen_image_head = image_head(hidden, vq.codebook_size) if generates else None
        self.edit_input_adapter = adapter(vq.codebook_dim, hidden) if edits else None
        self.edit_image_head = image_head(hidden, vq.codebook_size) if edits else None
        self.pixel_adapter = adapter(vq.codebook_dim, hidden) if edits else None

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.language_model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of decoder, heads and adapters; the image tokenizer stays in float32."""
        return self.language_model.norm.weight.dtype

    def image_parts(self, task: str) -> tuple[nn.Sequential, nn.Sequential]:
        """Input adapter and image head of `generate` or `edit`."""
        adapter, head = (
            (self.gen_input_adapter, self.gen_image_head)
            if task == "generate"
            else (self.edit_input_adapter, self.edit_image_head)
        )
        assert adapter is not None and head is not None, f"the model was loaded without the parts of '{task}'"
        return adapter, head

    def token_table(self, task: str) -> Tensor:
        """Decoder input of every image token, `(codebook_size, H)`: the adapter over the codebook."""
        assert self.vq is not None
        adapter, _ = self.image_parts(task)
        return adapter(self.vq.codebook().to(self.dtype))
