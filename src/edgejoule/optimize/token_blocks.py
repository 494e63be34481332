"""Blocks of plain Vision Transformers in which tokens become fewer: merged, or pruned. Static counts, and no state on modules.

What travels from block to block (sizes, places) is part of what a block returns: a tuple in place of a tensor, which the next block
takes apart; the last gives plain tokens. So a network works that calls its blocks as a Sequential and one that walks them; its maps
(``forward_intermediates``) are gone, as its tokens lie on no grid. Knows no importance but attention; trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgejoule.errors import ModelError
from edgejoule.optimize import matching
from edgejoule.optimize.copies import adopt, copied
from edgejoule.optimize.impossible import family_of, refuse
from edgejoule.optimize.token_attention import OpenAttention, opened

FAMILIES = ("vision_transformer", "deit", "vision_transformer_relpos", "t2t_vit")
POST_NORM = {  # whether a block normalises what attention and MLP give (Swin v2), not what they get
    "timm.models.vision_transformer.Block": False,
    "timm.models.vision_transformer.ResPostBlock": True,
    "timm.models.vision_transformer_relpos.RelPosBlock": False,
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock": True,
    "edgejoule.zoo.t2t_vit.Block": False,
}


class Merged(NamedTuple):
    """Tokens between merging blocks."""

    x: Tensor  # (B, N, C)
    sizes: Tensor | None  # (B, N) how many of the first block's tokens each one holds; None: one each
    places: Tensor | None  # (B, N0) int64: in which token each of the first block's is; None where nobody asks


class Kept(NamedTuple):
    """Tokens between pruning blocks."""

    x: Tensor  # (B, N, C)
    patches: int  # patch tokens of the first block
    origin: Tensor | None  # (B, N) int64: which of the first block's tokens each is; None: all are there, or nobody asks
    alive: Tensor | None  # (B, N) 0 or 1, in training only, when the dropped ones stay; None: all live


class TokenBlock(nn.Module):
    """What merging and pruning blocks share: attention and MLP around the original's own children, in the original's order."""

    post_norm: bool
    prefix: int  # class, distillation and register tokens, which lead
    last: bool
    attn: OpenAttention
    mlp: nn.Module

    def _through(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            part: Any = getattr(self, name, None)
            x = x if part is None else part(x)
        return x

    def _before(self, norm: str, x: Tensor) -> Tensor:
        return x if self.post_norm else self._through((norm,), x)

    def _after(self, number: str, y: Tensor) -> Tensor:
        scale = f"norm{number}" if self.post_norm else f"ls{number}"
        return self._through((scale, f"drop_path{number}", "drop_path"), y)

    def _feed(self, x: Tensor) -> Tensor:
        """(B, N, C): the MLP and what is around it."""
        return x + self._after("2", self.mlp(self._before("norm2", x)))


class MergingBlock(TokenBlock):
    """Between attention and MLP, r pairs of tokens become one each (ToMe, section 3).

    ``proportional``: a token of s counts in the softmax as s of them, log s on its logits. ``follow``: the places of the first block's
    tokens are kept track of. ``restore``: the last block gives every place its token again, so that a head that looks at all of
    them (a mean, a maximum, attention) counts each by its size, as the authors' mean does.
    """

    r: int
    proportional: bool
    follow: bool
    restore: bool

    def forward(self, tokens: Tensor | Merged, shared_rel_pos: Tensor | None = None) -> Tensor | Merged:
        """(B, N, C) or what the block before gave; ``shared_rel_pos`` (1, h, N0, N0) is the network's own bias of the whole image."""
        x, sizes, places = tokens if isinstance(tokens, Merged) else (tokens, None, None)
        seen = self.attn(self._before("norm1", x), self._bias(sizes, places, shared_rel_pos))
        x = x + self._after("1", seen.x)
        if r := matching.merges(x.shape[1], self.prefix, self.r):
            pairs = matching.match(seen.keys, r, self.prefix)
            if self.follow:
                moves = matching.destinations(x.shape[1], pairs)  # (B, N)
                places = moves if places is None else moves.gather(1, places)
            x, sizes = matching.averaged(x, x.new_ones(x.shape[:2]) if sizes is None else sizes, pairs)
        x = self._feed(x)
        if not self.last:
            return Merged(x, sizes, places)
        return matching.taken(x, places) if self.restore and places is not None else x

    def count_after(self, tokens: int, patches: int) -> int:
        """Tokens that go on, of so many that come."""
        return tokens - matching.merges(tokens, self.prefix, self.r)

    def _bias(self, sizes: Tensor | None, places: Tensor | None, shared: Tensor | None) -> Tensor | None:
        """What is added to the logits. A merged token's relative position bias is the mean over what it is made of: S bias S'."""
        bias = self.attn.positions(shared)  # (1, h, N0, N0)
        if sizes is None:
            return bias
        if bias is not None and places is not None:
            share = matching.one_hot(places, sizes.shape[1]).to(bias.dtype) / sizes.unsqueeze(-1)  # (B, N, N0), rows sum to 1
            bias = share.unsqueeze(1) @ bias @ share.unsqueeze(1).transpose(2, 3)  # (B, h, N, N)
        if not self.proportional:
            return bias
        logs = sizes.log()[:, None, None, :]  # (B, 1, 1, N)
        return logs if bias is None else bias + logs


class PruningBlock(TokenBlock):
    """Some patch tokens go before the block, by a predictor, or after it, by its attention. ``ceil(share * patches)`` stay.

    ``share_before`` with a child ``predictor``, ``share_after`` without one: 0 where none go. ``class_token``: its attention decides,
    else the mean over what all tokens pay. ``follow``: relative positions are gathered. ``pooled``: the head averages the patch tokens,
    and the norm behind the last block is one that knows which of them live.
    """

    share_before: float
    share_after: float
    class_token: bool
    follow: bool
    pooled: bool
    predictor: Any

    def forward(self, tokens: Tensor | Kept, shared_rel_pos: Tensor | None = None) -> Tensor | Kept:
        """(B, N, C) or what the block before gave; ``shared_rel_pos`` (1, h, N0, N0) is the network's own bias of the whole image."""
        state = tokens if isinstance(tokens, Kept) else Kept(tokens, tokens.shape[1] - self.prefix, None, None)
        if self.predictor is not None:
            state = self._predicted(state)
        leaving = self.share_after > 0
        seen = self.attn(self._before("norm1", state.x), self._bias(state, shared_rel_pos), state.alive, weights=leaving)
        x = self._feed(state.x + self._after("1", seen.x))
        state = state._replace(x=x)
        if leaving:
            paid = seen.weights[:, 0] if self.class_token else seen.weights.mean(dim=1)  # (B, N)
            state = self._best(state, paid[:, self.prefix :], self.share_after)
        if self.last and (state.alive is None or not self.pooled):
            return state.x
        return state

    def count_after(self, tokens: int, patches: int) -> int:
        """Tokens that go on, of so many that come; ``patches`` of the whole image."""
        for share in (self.share_before, self.share_after):
            tokens = self.prefix + staying(share, patches, tokens - self.prefix)
        return tokens

    def _predicted(self, state: Kept) -> Kept:
        patches = state.x[:, self.prefix :]  # (B, n, C)
        if not self.predictor.training:
            return self._best(state, self.predictor(patches), self.share_before)
        before = patches.new_ones(patches.shape[:2]) if state.alive is None else state.alive[:, self.prefix :]
        after = self.predictor.decide(patches, before)  # (B, n)
        return state._replace(alive=torch.cat([after.new_ones(len(after), self.prefix), after], dim=1))

    def _best(self, state: Kept, scores: Tensor, share: float) -> Kept:
        """The prefix and the patch tokens with the highest ``scores`` (B, n)."""
        keep = staying(share, state.patches, scores.shape[1])
        if keep == scores.shape[1]:
            return state
        chosen = self.prefix + scores.topk(keep, dim=1).indices  # (B, keep)
        lead = torch.arange(self.prefix, device=chosen.device).expand(len(chosen), -1)
        order = torch.cat([lead, chosen], dim=1)  # (B, P + keep)
        origin = order if state.origin is None else state.origin.gather(1, order)
        return state._replace(x=matching.taken(state.x, order), origin=origin if self.follow else None)

    def _bias(self, state: Kept, shared: Tensor | None) -> Tensor | None:
        """The relative position bias of the tokens that are left: its rows and columns."""
        bias = self.attn.positions(shared)  # (1, h, N0, N0)
        if bias is None or state.origin is None:
            return bias
        count, heads, places = state.x.shape[1], bias.shape[1], state.origin[:, None]  # (B, 1, N)
        rows = bias.expand(len(state.x), -1, -1, -1).gather(2, places.unsqueeze(3).expand(-1, heads, -1, bias.shape[3]))
        return rows.gather(3, places.unsqueeze(2).expand(-1, heads, count, -1))  # (B, h, N, N)


def staying(share: float, patches: int, left: int) -> int:
    """ceil(share * patches) of the ``left`` patch tokens; all where share is 0. Rounding errors of the product add no token."""
    return left if share <= 0 else max(1, min(left, math.ceil(share * patches - 1e-6)))


def counts(module: nn.Module) -> tuple[int, ...]:
    """Tokens after each block, prefix included, of a network that was changed by a pass here or that could be.

    Raises ModelError for a network without blocks of such tokens.
    """
    network: Any = module
    stem, grid = getattr(module, "patch_embed", None), getattr(module, "grid", None)
    patches = getattr(stem, "num_patches", None) or (math.prod(grid) if isinstance(grid, tuple) else None)
    if patches is None or family_of(module) not in FAMILIES:
        raise ModelError(f"{type(module).__name__} has no blocks of patch tokens to count: expected one of {', '.join(FAMILIES)}")
    tokens, found = patches + int(network.num_prefix_tokens), []
    for block in network.blocks.children():
        tokens = block.count_after(tokens, patches) if isinstance(block, MergingBlock | PruningBlock) else tokens
        found.append(tokens)
    return tuple(found)


def rebuilt(
    name: str, module: nn.Module, model: str, kind: type[TokenBlock], attributes: Callable[[nn.Module, int], Mapping[str, Any]]
) -> nn.Module:
    """A copy of a network in eval mode with every block replaced by one of ``kind``; ``attributes`` are of (copy, block number).

    ``name`` is the pass's, ``model`` the network's, both for messages. Raises ModelError for a network that this cannot be done to.
    """
    refuse(name, module, model)
    if family_of(module) not in FAMILIES:
        raise ModelError(
            f"{name} cannot work on {model}: it knows {', '.join(FAMILIES)}, not {family_of(module)}; leave it out of the recipe"
        )
    if any(isinstance(part, TokenBlock) for part in module.modules()):
        raise ModelError(f"{name} cannot work on {model}: its tokens become fewer already; name one such pass in a recipe")
    twin = copied(module)
    blocks: Any = twin.blocks
    for number, block in enumerate(list(blocks)):
        path = f"{type(block).__module__}.{type(block).__name__}"
        if path not in POST_NORM:
            raise ModelError(
                f"{name} cannot work on {model}: in its blocks ({type(block).__name__}) no tokens can go between attention and MLP, "
                "or their order is not known; leave it out of the recipe"
            )
        made = adopt(
            kind, block, post_norm=POST_NORM[path], prefix=int(twin.num_prefix_tokens), last=number == len(blocks) - 1,  # type: ignore[arg-type]
            **attributes(twin, number),
        )  # fmt: skip
        made.attn = opened(made.attn, model)
        blocks[number] = made
    twin.eval()
    return twin


def relative(module: Any) -> bool:
    """Whether attention knows relative positions of the whole image's tokens."""
    own = any(getattr(getattr(block, "attn", None), "rel_pos", None) is not None for block in module.blocks)
    return own or getattr(module, "shared_rel_pos", None) is not None


def looks_at_all(module: Any) -> bool:
    """Whether the head sees more of the tokens than the first."""
    return str(module.global_pool) != "token"
