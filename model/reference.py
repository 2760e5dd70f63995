"""The plain loop over Hugging Face's own Qwen2.5-VL modules: the engine's oracle, its benchmarks' baseline.

All rows of a call start and end together. It shares weights, vision tower, heads and image tokenizer with
a `Wallaroo` model, but neither decoder, attention and cache nor scheduling and sampling.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wallaroo.model.checkpoint import disk_tensors
from wallaroo.model.config import DecoderConfig
from wallaroo.model.engine.engine import END_OF_LINE, STOP_TOKENS
from wallaroo.model.engine.requests import Request, Result
from wallaroo.model.images import patchify
from wallaroo.model.prompts import Prompt
from wallaroo.model.sampling import MIN_TEMPERATURE, Sampling
from wallaroo.model.vision import embed_picture
from wallaroo.model.vq import to_float, to_uint8
from wallaroo.model.wallaroo import Wallaroo


def text_model(config: DecoderConfig, tensors: dict[str, Tensor]) -> Any:
    """Makes Hugging Face's text decoder.

    Args:
        config: Of the decoder.
        tensors: Its weights, named as in its own state dict; they are not copied.

    Returns:
        The `Qwen2_5_VLTextModel`.
    """
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    theirs = Qwen2_5_VLTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(config.mrope_section),
        },
    )
    with torch.device("meta"):
        decoder = Qwen2_5_VLTextModel._from_config(theirs, attn_implementation="sdpa")
    decoder.load_state_dict(tensors, assign=True)
    # The rotary table is computed, not stored, and has to leave the meta device too.
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(tensors["norm.weight"].device)
    return decoder.eval()


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from: temperature, top-k, top-p and softmax, in this order.

    Args:
        logits: `(rows, vocabulary)`.
        sampling: The same for all rows.

    Returns:
        `(rows, vocabulary)`; each row sums to 1.
    """
    logits = logits / max(sampling.temperature, MIN_TEMPERATURE)
    if sampling.top_k > 0:
        last = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(-1)
        surplus = mass.cumsum(-1) - mass > sampling.top_p
        logits = logits.masked_fill(surplus.scatter(-1, order, surplus), -torch.inf)
    return logits.softmax(-1)


class _Sequences:
    """Sequences in the decoder; those with prompts of equal length go together, without padding."""

    def __init__(self, decoder: Any, prompts: Sequence[Prompt], embeddings: Sequence[Tensor]):
        from transformers import DynamicCache

        self.decoder = decoder
        device = embeddings[0].device
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt.ids), []).append(index)
        self.groups = [
            (torch.tensor(same, device=device), DynamicCache(config=decoder.config))
            for same in by_length.values()
        ]
        self.next = torch.tensor([prompt.next_position for prompt in prompts], device=device)
        self.hidden = torch.empty(
            len(prompts), embeddings[0].shape[-1], device=device, dtype=embeddings[0].dtype
        )
        for same, cache in self.groups:
            members = same.tolist()
            positions = torch.from_numpy(np.stack([prompts[i].positions for i in members], 1))
            self._forward(same, cache, torch.stack([embeddings[i] for i in members]), positions.to(device))

    def feed(self, embeddings: Tensor) -> None:
        """One more token a sequence: embeddings `(sequences, H)`."""
        for same, cache in self.groups:
            self._forward(same, cache, embeddings[same, None], self.next[same, None].expand(3, -1, -1))
        self.next += 1

    def _forward(self, same: Tensor, cache: Any, embeddings: Tensor, positions: Tensor) -> None:
        output = self.decoder(
            inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True
        )
        self.hidden[same] = output.last_hidden_state[:, -1]


class Reference:
    """Serves requests in the published order of operations, all requests of a call at once.

    Args:
        model: Its weights are used, not copied.
    """

    def __init__(self, model: Wallaroo):
        self.model = model
        prefix = "model.language_model."
        tensors = disk_tensors(model).items()
        self.decoder = text_model(
            model.config.decoder,
            {key.removeprefix(prefix): x for key, x in tensors if key.startswith(prefix)},
        )

    @torch.inference_mode()
    def images(
        self, task: str, requests: Sequence[Request], trace: bool = False, decode_vq: bool = True
    ) -> list[Result]:
        """Serves requests of `generate` or `edit` that share size and sampling, in their order.

        The draws follow `torch.multinomial`, seeded with the first request's seed. They are not the
        engine's: to compare, sample greedily or force tokens.

        Args:
            task: `generate` or `edit`.
            requests: The rows.
            trace: Whether to keep the logits after guidance.
            decode_vq: Whether results have pixels.

        Returns:
            A result for each request, in order.
        """
        first, count = requests[0], len(requests)
        assert all((r.size, r.sampling) == (first.size, first.sampling) for r in requests)
        assert first.size is not None and self.model.vq is not None
        rows, columns = first.size.grid
        adapter, head = self.model.image_parts(task)
        codebook = self.model.vq.codebook().to(self.model.dtype)
        line_end = self._embed(torch.tensor(self.model.config.token_ids[END_OF_LINE]))
        sequences = self._prefill(requests, guided=first.sampling.guided)
        generator = torch.Generator(self.model.device).manual_seed(first.seed)
        tokens, logits = [], []
        for step in range(rows * columns):
            scores = head(sequences.hidden).float()
            if first.sampling.guided:
                conditional, null = scores.split(count)
                scores = null + first.sampling.cfg * (conditional - null)
            token = self._draw(scores, requests, step, generator)
            tokens.append(token)
            if trace:
                logits.append(scores)
            if step + 1 == rows * columns:
                break
            fed = adapter(codebook[token])
            sequences.feed(fed.repeat(2, 1) if first.sampling.guided else fed)
            if self.model.config.line_break and (step + 1) % columns == 0:
                sequences.feed(line_end.expand(len(sequences.hidden), -1))
        drawn = torch.stack(tokens, 1)
        pixels = [None] * count
        if decode_vq:
            pixels = [*to_uint8(self.model.vq.decode(drawn.view(count, rows, columns))).cpu().numpy()]
        return [
            Result(
                request.key,
                drawn[index].int().cpu().numpy(),
                pixels[index],
                "length",
                len(request.prompt.ids),
                logits=torch.stack([score[index] for score in logits]).cpu().numpy() if trace else None,
            )
            for index, request in enumerate(requests)
        ]

    @torch.inference_mode()
    def text(self, request: Request, trace: bool = False) -> Result:
        """Serves one request of `understand`.

        Args:
            request: The request.
            trace: Whether the result has the logits.

        Returns:
            The result.
        """
        assert self.model.lm_head is not None
        stops = [self.model.config.token_ids.get(name) for name in STOP_TOKENS]
        sequences = self._prefill([request], guided=False)
        generator = torch.Generator(self.model.device).manual_seed(request.seed)
        tokens: list[int] = []
        logits = []
        reason = "length"
        while len(tokens) < request.max_new_tokens:
            scores = self.model.lm_head(sequences.hidden).float()
            logits.append(scores[0])
            token = self._draw(scores, [request], len(tokens), generator)
            if token.item() in stops:
                reason = "stop"
                break
            tokens.append(int(token))
            if len(tokens) < request.max_new_tokens:
                sequences.feed(self._embed(token))
        return Result(
            request.key,
            np.array(tokens, np.int32),
            finish_reason=reason,
            prompt_tokens=len(request.prompt.ids),
            logits=torch.stack(logits).cpu().numpy() if trace else None,
        )

    def _draw(
        self, logits: Tensor, requests: Sequence[Request], step: int, generator: torch.Generator
    ) -> Tensor:
        """Tokens `(rows,)` of one step: greedy or drawn, unless the request forces them."""
        if requests[0].sampling.top_k == 1:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial(
                probabilities(logits, requests[0].sampling), 1, generator=generator
            ).squeeze(1)
        for index, request in enumerate(requests):
            if request.forced is not None and request.forced[step] >= 0:
                token[index] = int(request.forced[step])
        return token

    def _prefill(self, requests: Sequence[Request], guided: bool) -> _Sequences:
        """The prompts of all conditional, then of all null sequences."""
        sources = [(request.prompt, request.semantic, request.pixels) for request in requests]
        for request in requests if guided else ():
            assert request.null is not None
            # The null branch of an edit sees a black picture.
            semantic, pixels = (
                None if image is None else np.zeros_like(image)
                for image in (request.semantic, request.pixels)
            )
            sources.append((request.null, semantic, pixels))
        embeddings = [self.embed_prompt(*source) for source in sources]
        return _Sequences(self.decoder, [prompt for prompt, _, _ in sources], embeddings)

    def embed_prompt(self, prompt: Prompt, semantic: np.ndarray | None, pixels: np.ndarray | None) -> Tensor:
        """Decoder inputs of one prompt, with the source's embeddings in their places.

        Args:
            prompt: The prompt, L tokens.
            semantic: Source for the vision tower, uint8 `(h, w, 3)`, or None.
            pixels: Source for the image tokenizer, uint8 `(H, W, 3)`, or None.

        Returns:
            `(L, H)`, H as in `DecoderConfig.hidden_size`.
        """
        model, device = self.model, self.model.device
        embedded = self._embed(torch.from_numpy(prompt.ids))
        if prompt.semantic is not None:
            assert model.visual is not None and semantic is not None
            patches, grid = patchify(semantic)
            seen = embed_picture(model.visual, torch.from_numpy(patches).to(device), grid)
            embedded[slice(*prompt.semantic)] = seen
        if prompt.pixel is not None:
            assert model.vq is not None and model.pixel_adapter is not None and pixels is not None
            latents = model.vq.encode(to_float(torch.from_numpy(pixels).to(device)[None]))[0]
            embedded[prompt.pixel] = model.pixel_adapter(latents.flatten(1).T.to(model.dtype))
        return embedded

    def _embed(self, ids: Tensor) -> Tensor:
        return self.decoder.embed_tokens(ids.long().to(self.model.device)).clone()
