"""Wrapped source -> nn.Module: the emitted class around networks that can be traced.

net(image)                 the answer; of an autoencoder the patches found, and the mask
net.body                   the layers, a Network: tokens -> tokens
net.trace(image)           their trace on the embedded tokens
net.generate(text, 300)    of a network that says which token comes next: what follows
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unroll.derivation.step import Learned
from unroll.errors import SpecError, UnrollError
from unroll.model.generation import WRITTEN, Draw, at_rest, check_length, continued
from unroll.model.parts import Held
from unroll.model.source import Wrapped, wrap
from unroll.model.words import Words, agree, pieces, read_record
from unroll.network.kept import Kept
from unroll.network.kinds import check_kind, check_place, check_whole
from unroll.network.network import Network, load
from unroll.network.saved import SOURCE, WAY_OUT, WORDS, recompile, refuse_changed, restore, write
from unroll.network.trace import Trace
from unroll.network.values import refuse_empty_masks
from unroll.spec import Spec
from unroll.spec import load as load_spec
from unroll.spec.schema import NoPositions, PatchEmbed, PooledHead, StemEmbed, TiedHead, TokenEmbed

if TYPE_CHECKING:
    import networkx as nx

Kind = Literal["matrix", "table", "scalar"]
SHARED = ("wrapped", "spec", "derivation", "_words")
"""Never copied: frozen, or as good as."""


class Model(nn.Module):
    """An emitted model and what it stands for. Made by `model`, which mixes this class with the emitted one.

    body: the layers.  spec, derivation, wrapped: what it was made from.
    """

    body: Network
    spec: Spec
    derivation: Any
    wrapped: Wrapped
    _words: Words | None = None

    @property
    def words(self) -> Words | None:
        """What tokens stand for, where that is known. Set to others, raises SpecError E420 if they are more than the table has rows."""
        return self._words

    @words.setter
    def words(self, words: Words | None) -> None:
        if words is not None:
            agree(words, self.spec)
        self._words = words

    @property
    def source(self) -> str:
        """The Python text of the model, the layers within it."""
        return self.wrapped.source

    @property
    def graph(self) -> nx.DiGraph[int]:
        """Tensor operations of one layer and of what goes before it."""
        return self.body.graph

    @property
    def inputs(self) -> tuple[str, ...]:
        """What `forward` takes: image, tokens, or the word of the layers, and what says which tokens are no padding; without the mask of patches."""
        return (self.wrapped.argument, *self.wrapped.body.masks)

    @property
    def layers(self) -> int:
        return self.body.layers

    @property
    def coder(self) -> Network | None:
        """The layers of the decoder."""
        return cast("Network | None", self._modules.get("decoder"))

    @property
    def networks(self) -> dict[str, Network]:
        """The layers by the prefix of their parameters: body, and decoder where there is one."""
        return {"body": self.body} | ({"decoder": self.coder} if self.coder is not None else {})

    @property
    def learned(self) -> tuple[Learned, ...]:
        """What is learned within the layers."""
        return tuple(p for net in self.networks.values() for p in net.learned)

    @property
    def kinds(self) -> dict[str, Kind]:
        """Of every parameter, in the order of `named_parameters`: a matrix, a table of tokens or places, or numbers
        such as steps, biases and the weights of norms."""
        around = {h.name: h.kind for h in self.wrapped.held}
        own = {f"{k}.{name}": p.kind for k, net in self.networks.items() for name, p in _named(net)}
        found: dict[str, Any] = {}
        for name, p in self.named_parameters():
            kind = own[name] if name in own else around[name.split(".")[0]]
            found[name] = "scalar" if kind == "matrix" and name not in own and p.ndim < 2 else kind
        return found

    @property
    def given(self) -> dict[str, Tensor]:
        """Values of the parameters of the problem, as `compile(parameters=)` takes them."""
        return _prefixed({k: net.given for k, net in self.networks.items()})

    @property
    def scalars(self) -> dict[str, float]:
        return _prefixed({k: net.scalars for k, net in self.networks.items()})

    @property
    def sizes(self) -> dict[str, int]:
        """As `compile(dims=)` takes them."""
        return _prefixed({k: net.sizes for k, net in self.networks.items()})

    def forward(self, x: Tensor, mask: Tensor | None = None, **named: Tensor) -> Any:
        """As the emitted class says; mask: of patches, or of tokens, which may be given by its own name too. Raises UnrollError E404, E403."""
        given = self._checked(x, self._mask(mask, named))
        try:
            return cast(Any, super()).forward(*given)
        except IndexError:  # a word that no table has
            self._refuse_unknown_words(x)
            raise

    def trace(self, x: Tensor, mask: Tensor | None = None, **asked: Any) -> Trace:
        """Every iterate of the layers on these samples; of an autoencoder behind a mask, a random one if left out.

        asked: at, parameters and terms, as `Network.trace` takes them.
        """
        net, there = cast(Any, self), self.wrapped.there
        mask = self._mask(mask, {there: asked.pop(there)} if there in asked else {})
        (x, *given) = self._checked(x, mask)
        if self.wrapped.model.mask is not None:
            return self.body.trace(net.embedding(x, net.random_mask(x) if mask is None else mask), **asked)
        self._refuse_unknown_words(x)
        if there:
            padded = self.wrapped.model.class_token is not None
            asked[there] = nn.functional.pad(given[0], (1, 0), value=1) if padded else given[0]
        return self.body.trace(**{self.wrapped.fed: net.embedding(x)}, **asked)

    def generate(
        self,
        tokens: Tensor | str,
        length: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        window: int | None = None,
        kept: bool | None = None,
        stream: Callable[[Any], Any] | None = None,
    ) -> Any:
        """A text that goes on: (B, T) or (T,) tokens and `length` more, each drawn from what the network says comes next; or a str.

        length: if left out, as many as the longest text has room for, or a window makes room for, 300 at most.
        temperature: what logits are divided by; 0 takes the likeliest.  top_k, top_p: of so many of the likeliest; of those that
        have this share together.  window: go on beyond the longest text, each time from the last `window` tokens as from a new one.
        kept: read each new token alone, with what the layers keep of those before (True, False; None: where that can be).
        stream: is told of each new token, (B,) or (); of a str, of each new piece. Draws depend on seed alone.
        Raises UnrollError E404 (what is asked for), E422 (no network that says which token comes next, or no words for a str), E423
        (kept=True where nothing can be kept). Warns where kept=None has to read the whole text for each token.
        """
        check_whole(length=length, top_k=top_k, seed=seed, window=window)
        draw = Draw(temperature, top_k, top_p)
        if isinstance(tokens, str):
            words, begun = self._begun(tokens)
            new = (int(t) for t in self._following(begun, length, draw, seed, window, kept))
            text = tokens
            for piece in pieces(words, new, begun[0].tolist()):
                text += piece
                if stream is not None:
                    stream(piece)
            return text
        if not isinstance(tokens, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            self._readable()
            self._check_words("tokens", tokens)
        texts = torch.atleast_2d(tokens)
        found = [texts]
        for new in self._following(texts, length, draw, seed, window, kept):
            found.append(new[:, None].to(texts.dtype))
            if stream is not None:
                stream(new if tokens.ndim == 2 else new[0])
        return torch.cat(found, 1).reshape(*tokens.shape[:-1], -1)

    def _following(
        self, texts: Tensor, length: int | None, draw: Draw, seed: int, window: int | None, kept: bool | None
    ) -> Iterator[Tensor]:
        """New tokens (B,) after (B, T), one after another."""
        most, known = self._readable()
        self._check_words("tokens", texts)
        room = WRITTEN if window is not None else most + 1 - texts.shape[-1]
        length = min(WRITTEN, max(room, 0)) if length is None else length
        check_length(texts, length, most, window)
        self._refuse_unknown_words(texts)
        answer = self._by_what_is_kept() if self._keeps(kept) else self._by_the_whole_text
        with at_rest(self):
            yield from continued(texts, length, answer, draw, seed=seed, known=known, most=most, window=window)

    def _by_the_whole_text(self, tokens: Tensor, anew: bool) -> Tensor:
        """Logits of the token after these: (B, T) -> (B, V)."""
        del anew
        return self(tokens)[:, -1]

    def _by_what_is_kept(self) -> Callable[[Tensor, bool], Tensor]:
        """The same, from tokens that it has not read yet."""
        kept = Kept()

        def answer(tokens: Tensor, anew: bool) -> Tensor:
            nonlocal kept
            kept = Kept() if anew else kept
            return self.extend(tokens[:, kept.seen :], kept)[:, -1]

        return answer

    def extend(self, tokens: Tensor, kept: Kept) -> Tensor:
        """The answer at the next tokens of a text, from these alone: (B, n) -> (B, n, V). A new `unroll.network.kept.Kept()` begins a text.

        Takes no derivatives. Raises UnrollError E404 (tokens), E422, E423 where something over tokens has nothing that it could keep.
        """
        most, _ = self._readable()
        if why := self._unkept:
            raise UnrollError("E423", f"{why} keeps nothing from token to token", hint="the whole text in each call")
        self._check_words(self.wrapped.argument, tokens)
        self._refuse_unknown_words(tokens)
        if tokens.ndim != 2 or (kept.seen and len(tokens) != kept.texts):
            expected = f"({kept.texts if kept.seen else 'B'}, n)"
            raise UnrollError("E404", f"tokens has shape {tuple(tokens.shape)}, expected {expected}")
        kept.texts = len(tokens)
        if kept.seen + tokens.shape[-1] > most:
            message = f"{kept.seen} tokens and {tokens.shape[-1]} more are longer than the longest text, {most}"
            raise UnrollError("E404", message)
        net, places = cast(Any, self), self.wrapped.model.positions
        with torch.no_grad():
            x = (
                net.embedding(tokens)
                if places is None or isinstance(places, NoPositions)
                else net.embedding(tokens, kept.seen)
            )
            return net.read(self.body.extend(x, kept))

    @property
    def _unkept(self) -> str:
        """What stands in the way of reading the next tokens alone; "" if nothing does."""
        return "a class token" if self.wrapped.model.class_token is not None else self.body.program.growth.why

    def _keeps(self, wanted: bool | None) -> bool:
        if wanted and self._unkept:
            hint = "kept=False reads the whole text for each token"
            raise UnrollError("E423", f"{self._unkept} keeps nothing from token to token", hint=hint)
        if wanted is None and self._unkept:
            said = f"the whole text is read for each token: {self._unkept} keeps nothing from token to token"
            warnings.warn(said, stacklevel=4)
        return not self._unkept if wanted is None else wanted

    def _begun(self, text: str) -> tuple[Words, Tensor]:
        """The words, and the tokens (1, T) of a text. Raises UnrollError E404 (an empty one), E422 (no words)."""
        self._readable()
        if self.words is None:
            hint = "net.words = unroll.words('tokenizer.json'); or give tokens in place of a text"
            raise UnrollError("E422", "this network does not know what its tokens stand for", hint=hint)
        begun = self.words.encode(text)
        if not begun:
            raise UnrollError("E404", "an empty text says nothing of what comes next", hint="begin it with a word")
        return self.words, torch.tensor([begun], device=next(self.parameters()).device)

    def _readable(self) -> tuple[int, int]:
        """The longest text, and how many tokens stand for words. Raises UnrollError E422 where no answer is a next token."""
        embed, head = self.wrapped.model.embed, self.wrapped.model.head
        if there := self.wrapped.there:
            hint = "the same spec without that input writes texts; a text that is written has no padding"
            raise UnrollError("E422", f"this network takes a mask, {there}, with each call", hint=hint)
        answers = isinstance(head, TiedHead) or (
            isinstance(head, PooledHead)
            and head.kind == "tokens"
            and isinstance(embed, TokenEmbed)
            and head.classes == embed.vocabulary
        )
        if not isinstance(embed, TokenEmbed) or not answers:
            hint = "embed: {kind: tokens, ..} and head: {kind: tied}"
            raise UnrollError("E422", "this network does not say which token comes next", hint=hint)
        return embed.length, embed.vocabulary if self.words is None else self.words.size

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write spec, weights, source and words into a folder, each file whole or not at all.

        A head (or a table of words) that was put in the place of the former one is written where the spec can say it.
        """
        spec, source = self._as_it_is()
        words = {} if self.words is None else {WORDS: _written(self.words)}
        return write(folder, spec, self, {SOURCE: source.encode(), **words})

    @staticmethod
    def restore(folder: str | os.PathLike[str]) -> Model:
        """The model that `save` wrote. Raises UnrollError E405."""
        found = restored(folder)
        if not isinstance(found, Model):
            raise UnrollError("E405", f"{folder} holds layers alone, not a model", hint="unroll.restore reads both")
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        values = (self.sizes, self.given, self.scalars, self.state_dict(), self.training)
        return recompile, (self._as_it_is()[0].to_yaml(), *values), {"_words": self.words}

    def _as_it_is(self) -> tuple[Spec, str]:
        """The spec that says all of this model but values, and the text of its class. Raises UnrollError E405 where there is none."""
        inner = {name: self._modules.get(name) for name in ("body", "decoder")}
        networks = {name: net for name, net in inner.items() if isinstance(net, Network)}
        programs = [networks[name].program if name in networks else None for name in inner]
        if programs[0] is None or wrap(self.spec, programs[0], programs[1]).source != self.source:
            raise UnrollError("E405", "the layers of this model are no longer those of its spec", hint=WAY_OUT)
        changes = [change for h in self.wrapped.held for change in _said(h, self._modules.get(h.name), self.spec)]
        spec = self.spec
        with suppress(SpecError):  # what no spec says is refused by its name below
            spec = load_spec(spec.to_dict(), changes) if changes else spec
        wrapped = wrap(spec, programs[0], programs[1])
        refuse_changed(self, unset(wrapped), tuple(inner))
        for net in networks.values():
            net.as_made("saved")
        return spec, wrapped.source

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = {k: v if k in SHARED else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        return new

    def _checked(self, x: Any, mask: Any) -> tuple[Tensor, ...]:
        """The arguments of the emitted class. Raises UnrollError E404 where they do not fit."""
        name, want = self.wrapped.argument, self.wrapped.shape
        if isinstance(self.wrapped.model.embed, TokenEmbed):
            self._check_words(name, x)
        else:
            check_kind(name, x, next(self.parameters(), None))
        shape = tuple(x.shape)
        last = shape[max(len(shape) - len(want), 0) :]
        batched = len(shape) >= len(want) if self.wrapped.flat else len(shape) == len(want) + 1
        if not batched or any(n is not None and n != k for n, k in zip(want, last, strict=True)):
            axes = ", ".join("N" if n is None else str(n) for n in want)
            lead = "..." if self.wrapped.flat else "B"
            raise UnrollError("E404", f"{name} has shape {shape}, expected ({lead}, {axes})")
        if self.wrapped.there:
            of_image = isinstance(self.wrapped.model.embed, PatchEmbed | StemEmbed)
            self._check_there(mask, (shape[0], cast(int, self.wrapped.tokens) if of_image else shape[1]), x)
            return (x, mask.to(next(self.parameters()).dtype))
        if mask is None:
            return (x,)
        if self.wrapped.model.mask is None:
            raise UnrollError("E404", "this model has no mask", hint="add  mask: {ratio: 0.75}  to model:")
        hidden = (shape[0], self.wrapped.tokens)
        if getattr(mask, "dtype", None) != torch.bool or tuple(mask.shape) != hidden:
            found = (
                f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"of type {type(mask).__name__}"
            )
            raise UnrollError("E404", f"mask is {found}, expected torch.bool {hidden}")
        check_place("mask", mask, x, name)
        return (x, mask)

    def _mask(self, mask: Any, named: Mapping[str, Any]) -> Any:
        """The second argument, by its place or by its name. Raises UnrollError E404."""
        there = self.wrapped.there
        for name, value in named.items():
            if name != there or mask is not None:
                said = (
                    "is given twice" if name == there else f"is nothing that this model takes: {', '.join(self.inputs)}"
                )
                raise UnrollError("E404", f"'{name}' {said}")
            mask = value
        return mask

    def _check_there(self, mask: Any, want: tuple[int, int], x: Tensor) -> None:
        """Raises UnrollError E404 (shape, device), E403 (a value that is not 0 or 1, a sample of padding alone)."""
        name = self.wrapped.there
        if not isinstance(mask, Tensor) or tuple(mask.shape) != want:
            found = (
                f"has shape {tuple(mask.shape)}"
                if isinstance(mask, Tensor)
                else "is missing"
                if mask is None
                else f"is a {type(mask).__name__}"
            )
            raise UnrollError("E404", f"the mask {name} {found}, expected {want}: 1 for a token, 0 for padding")
        check_place(name, mask, x, self.wrapped.argument)
        if not torch.compiler.is_compiling():
            refuse_empty_masks(self.wrapped.body.problem.inputs, {name: mask})

    def _check_words(self, name: str, x: Any) -> None:
        embed = cast(TokenEmbed, self.wrapped.model.embed)
        if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
            found = x.dtype if isinstance(x, Tensor) else f"of type {type(x).__name__}"
            message = f"{name} are whole numbers below {embed.vocabulary}, not {found}"
            raise UnrollError(
                "E404", message, hint=f"torch.as_tensor({name}, dtype=torch.int64), of the number of each word"
            )
        if (own := next(self.parameters(), None)) is not None:
            check_place(name, x, own, "the network")
        if x.ndim and x.shape[-1] > embed.length:
            raise UnrollError("E404", f"{x.shape[-1]} tokens are more than the longest text has, {embed.length}")
        if x.device.type not in ("cpu", "meta") and not torch.compiler.is_compiling():
            self._refuse_unknown_words(x)  # elsewhere than on a CPU, a lookup beyond the table ends the process

    def _refuse_unknown_words(self, x: Tensor) -> None:
        """Raises UnrollError E404 for tokens that the table has no row for."""
        embed = self.wrapped.model.embed
        if not isinstance(embed, TokenEmbed) or not x.numel():
            return
        low, high = (int(end) for end in torch.aminmax(x))
        if low < 0 or high >= embed.vocabulary:
            message = f"{self.wrapped.argument} are whole numbers from 0 to {embed.vocabulary - 1}; these go from {low} to {high}"
            raise UnrollError("E404", message, hint="words by the vocabulary that the model was made for")


def restored(folder: str | os.PathLike[str]) -> Model | Network:
    """What `save` of a model, or of layers alone, wrote. Raises UnrollError E405."""
    net = cast("Model | Network", restore(folder))
    path = Path(folder) / WORDS
    if isinstance(net, Model) and path.is_file():
        try:
            net.words = read_record(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as e:
            raise UnrollError("E405", f"{path} is damaged: {e}") from None
    return net


def _written(words: Words) -> bytes:
    return json.dumps(words.record(), ensure_ascii=False).encode()


def _said(held: Held, now: nn.Module | None, spec: Spec) -> list[str]:
    """Overrides by which the spec says what stands in the place of a part; none where that is as it was, or is nothing it could say."""
    found: dict[str, Any] = {}
    match now:
        case nn.Linear() if held.says == "head.classes":
            found = {"classes": now.out_features}
            if isinstance(spec.at("model", "head"), PooledHead):
                found["bias"] = "bias" in dict(now.named_parameters())
        case nn.Embedding() if held.says == "embed.vocabulary":
            found = {"vocabulary": now.num_embeddings}
        case nn.Identity() if held.says:
            found = {"norm": False} if held.says == "head.norm" else {"classes": None}
        case _:
            pass
    path = ("model", held.says.split(".")[0])
    return [f"{'.'.join(path)}.{k}={json.dumps(v)}" for k, v in found.items() if getattr(spec.at(*path), k, None) != v]


def _named(net: Network) -> list[tuple[str, Learned]]:
    return [(name, p) for (name, _), p in zip(net.named_parameters(), net.learned, strict=True)]


def _prefixed(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Names of the layers as they are, those of the decoder with its name before them."""
    return {(f"{k}.{name}" if k == "decoder" else name): v for k, values in found.items() for name, v in values.items()}


@cache
def _mixed(source: str, name: str) -> type[Model]:
    emitted = load(source, name)[name]
    return cast(type[Model], type(name, (Model, emitted), {"__doc__": emitted.__doc__, "__module__": __name__}))


def model(spec: Spec, body: Network, decoder: Network | None, *, seed: int, dtype: torch.dtype | None = None) -> Model:
    """The model that a spec puts around its layers, drawn from the seed without a look at torch's own generator.

    Raises UnrollError E420 where parts and layers do not fit.
    """
    net = unset(wrap(spec, body.program, decoder.program if decoder else None))
    net.to(torch.float64).to_empty(device="cpu")  # drawn in float64, so that every type starts at the same values
    cast(Any, net).initialise(torch.Generator().manual_seed(seed_of(seed, "model")))
    net.to(dtype or torch.get_default_dtype())
    net.to(next((t.device for t in (*body.parameters(), *body.buffers())), torch.device("cpu")))
    return with_layers(net, spec, body, decoder)


def with_layers(net: Model, spec: Spec, body: Network, decoder: Network | None) -> Model:
    """The model around its layers."""
    net.spec, net.derivation = spec, body.derivation
    net.body = body
    if decoder is not None:
        net.decoder = decoder
    return net


def unset(wrapped: Wrapped, device: str = "meta") -> Model:
    """What stands around the layers; parameters have sizes and no values yet."""
    made = _mixed(wrapped.source, wrapped.class_name)
    net = made.__new__(made)
    with torch.device(device), _Undrawn():
        cast(Any, super(Model, net)).__init__()
    net.wrapped = wrapped
    return net


class _Undrawn(TorchFunctionMode):
    """Parts are made without draws of their own: on the meta device the first one of a process imports torch._dynamo, a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


def seed_of(seed: int, what: str) -> int:
    """A seed of its own for each purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:7], "big")
