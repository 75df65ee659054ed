"""Checkpoints and plans as a model of EleutherAI's lm-evaluation-harness.

    python -m moe_surgery.integrations.lm_eval run --model moe_surgery \
        --model_args pretrained=openai/gpt-oss-20b,plan=law-8.json --tasks arc_easy

is `lm_eval` with this model registered. Versions after 0.4.13 find it by its entry point, so that `lm_eval run --model
moe_surgery` works as it is. In Python, importing this module registers it for `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import lm_eval.models  # noqa: F401  # registers lm-eval's own models, which it does only for an empty registry
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.quality.candidates import Candidate
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.likelihood import BATCH_TOKENS, log_likelihoods
from moe_surgery.quality.own_layers import as_layers
from moe_surgery.runtime.load import load_model
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.sampling import Sampling
from moe_surgery.runtime.text import Text
from moe_surgery.runtime.until import cut, generate_until

__all__ = ["NAME", "MoeSurgeryLM", "main"]

NAME = "moe_surgery"
MAX_GEN_TOKENS = 256
MARK = "\N{SNOWMAN}\N{SNOWMAN}"
SAMPLING = ("top_k", "top_p", "min_p", "seed")
log = logging.getLogger("moe_surgery")


class MoeSurgeryLM(TemplateLM):
    """A checkpoint, or a plan of it as a view, in little memory.

    Likelihoods are computed one layer at a time for `batch_tokens` tokens of all requests together: memory holds one
    layer and their hidden states. Generation maps the whole model, once a task needs it.
    """

    def __init__(
        self,
        pretrained: str,
        plan: str | None = None,
        top_k: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKENS,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
    ) -> None:
        """`pretrained`, `plan`, `top_k`, `device`, `dtype` ("float32", "bfloat16" or "float16") and `backend` as for
        `load_model`; a CUDA device, lm-eval's default, is the CPU where there is none. `batch_size` is how many
        prompts generate together; "auto": as many as `batch_tokens` allows, at most `max_batch_size`. `max_length` is
        the context, by default the model's. Text without context follows `prefix_token_id`, by default the
        tokenizer's bos token, else its eos token. `chat_template_args` are variables of the chat template.

        Raises as `load_model` and `Text`, UsageError for an unknown dtype or sizes below 1.
        """
        super().__init__()
        compute_dtype = None if dtype in (None, "auto") else getattr(torch, str(dtype), None)
        if dtype not in (None, "auto") and not isinstance(compute_dtype, torch.dtype):
            raise UsageError(f"`dtype` {dtype}: choose one of float32, bfloat16, float16")
        self._arguments: dict[str, Any] = {
            "path": pretrained,
            "device": _device(device),
            "dtype": compute_dtype,
            "plan": plan,
            "backend": backend,
            "top_k": top_k,
        }
        for name, value in (("batch_tokens", batch_tokens), ("max_gen_toks", max_gen_toks)):
            if value < 1:
                raise UsageError(f"`{name}` {value}: must be at least 1")
        self._layers = load_model(**self._arguments, one_layer=True)
        self._text = Text(pretrained)
        config = self._layers.config
        if max_length is not None and not 1 <= max_length <= config.max_position_embeddings:
            raise UsageError(
                f"`max_length` {max_length}: this model supports 1 to {config.max_position_embeddings} tokens"
            )
        self.max_length = max_length or config.max_position_embeddings
        self.max_gen_toks = max_gen_toks
        self._batch_tokens = batch_tokens
        self._most_prompts = max_batch_size or 64
        automatic = batch_size is None or str(batch_size).startswith("auto")
        if not automatic and not (str(batch_size).isdecimal() and int(str(batch_size)) > 0):
            raise UsageError(f"`batch_size` {batch_size}: must be at least 1, or auto")
        self.batch_size = "auto" if automatic else int(str(batch_size))
        self._pretrained = pretrained
        self._prefix = prefix_token_id
        self._variables = chat_template_args or {}
        self._device = self._layers.device

    @cached_property
    def _whole(self) -> CausalLM:
        return load_model(**self._arguments)

    @property
    def eot_token_id(self) -> int:
        named = self._text.special_token("eos")
        return self._layers.config.eos_token_ids[0] if named is None else named

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is not None:
            return self._prefix
        named = self._text.special_token("bos")
        return self.eot_token_id if named is None else named

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of `string`; no special tokens are added."""
        return self._text.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        passages = []
        for _, context, continuation in requests:
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            start = len(tokens) - len(continuation)
            if start < 1:
                raise UsageError(
                    f"a continuation of {len(continuation)} tokens; the context is {self.max_length}"
                )
            passages.append(Passage("", tuple(tokens), start))
        if cut := sum(len(c) + len(t) > self.max_length + 1 for _, c, t in requests):
            log.warning(
                "%d requests exceed the context of %d tokens; their beginnings are left out",
                cut,
                self.max_length,
            )
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            found = log_likelihoods(
                self._layers,
                [Candidate(NAME, None, model=as_layers(self._layers))],
                passages,
                batch_tokens=self._batch_tokens,
                progress=bar.update,
            )[0]
        answers = [(likelihood.log_probability, likelihood.greedy) for likelihood in found]
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (log_probability, _) in zip(owners, scored, strict=True):
            sums[number] += log_probability
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        results: dict[int, str] = {}
        by_settings: dict[str, list[int]] = {}
        tokens = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(number)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for numbers in by_settings.values():
                settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
                new = settings["max_gen_toks"]
                most = self.max_length - new
                if most < 1:
                    raise UsageError(f"`max_gen_toks` {new}: the context is {self.max_length} tokens")
                waiting = sorted(numbers, key=lambda n: -len(tokens[n]))
                if len(tokens[waiting[0]]) > most:
                    log.warning("prompts of more than %d tokens lose their beginnings", most)
                while waiting:
                    size = self._together(min(most, len(tokens[waiting[0]])) + new)
                    group, waiting = waiting[:size], waiting[size:]
                    texts = self._generate([tokens[n][-most:] for n in group], settings)
                    for n, text in zip(group, texts, strict=True):
                        results[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    bar.update(len(group))
        return [results[n] for n in range(len(requests))]

    def _together(self, tokens: int) -> int:
        """How many sequences of up to `tokens` tokens to generate at once."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        return max(1, min(self._most_prompts, self._batch_tokens // tokens))

    def _generate(self, prompts: Sequence[Sequence[int]], settings: dict[str, Any]) -> list[str]:
        sampling = Sampling()
        if settings["do_sample"]:
            given = {key: settings[key] for key in SAMPLING if settings.get(key) is not None}
            sampling = Sampling(temperature=float(settings["temperature"]), **given)
        until = handle_stop_sequences(settings["until"], eos=None)
        # In a turn of a conversation the answer may follow reasoning, in which `until` ends nothing.
        turns = [self._text.parser(prompt).structured for prompt in prompts]
        continuations = generate_until(
            self._whole,
            self._text,
            prompts,
            until=() if any(turns) else until,
            max_new_tokens=settings["max_gen_toks"],
            stop_tokens=[*self._whole.config.eos_token_ids, self.eot_token_id],
            sampling=sampling,
        )
        answers = []
        for prompt, turn, found in zip(prompts, turns, continuations, strict=True):
            text = self._text.split(prompt, found.tokens).answer if turn else found.text
            answers.append(cut(text, [end for end in until if end]))
        return answers

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in caches of requests."""
        return self._pretrained.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the checkpoint's chat template, for the results; None where none is to be applied."""
        if chat_template is False or chat_template is None:
            return None
        return self._text.template_source("default" if chat_template is True else chat_template)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """`chat_history` up to where the model's answer begins; without `add_generation_prompt` the last message is
        the beginning of the answer, as with transformers' `continue_final_message`."""
        if add_generation_prompt:
            return self._text.chat(chat_history, variables=self._variables)
        *before, last = chat_history
        marked = {**last, "content": f"{last['content']}{MARK} "}
        rendered = self._text.chat([*before, marked], prompt=False, variables=self._variables)
        begun, mark, rest = rendered.rpartition(MARK)
        if not mark:
            raise InvalidInputError(
                "the model's chat template leaves out the last message; it cannot be continued"
            )
        return begun if rest.startswith(" ") else begun.rstrip()  # some templates strip messages

    def get_model_info(self) -> dict[str, Any]:
        """What computed the results."""
        return {
            "model_dtype": str(self._layers.dtype),
            **self._layers.computation,
            "plan": self._arguments["plan"],
        }


def _device(asked: str | None) -> str:
    """The device to use: lm-eval asks for "cuda:0" unless told otherwise."""
    if asked is not None and asked.startswith("cuda") and not torch.cuda.is_available():
        log.warning("no CUDA device here: computing on the CPU")
        return "cpu"
    return asked or "cpu"


if NAME not in model_registry:  # later versions of lm-eval know the entry point
    register_model(NAME)(MoeSurgeryLM)


def main() -> None:
    """`lm_eval` with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
