"""Language models in the manner of transformers' BERT, GPT-2, Llama and T5, and LightningModules that train them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.projects import BATCHES, Loader, Project
from tests.zoo import tokens

WIDTH, HEADS, VOCABULARY = 24, 4, 32


class Language(Project):
    """The step shifts the tokens, and takes the logits out of what ``forward`` returns."""

    def train_dataloader(self) -> Any:
        return Loader(list(tokens(8 * BATCHES, 7, below=VOCABULARY).split(8)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self(batch[:, :-1])["logits"]
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class BertLayer(nn.Module):
    """Attention whose head size follows from the width, and norms after the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = HEADS, WIDTH // HEADS
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query, self.key, self.value = (nn.Linear(WIDTH, self.all_head_size) for _ in range(3))
        self.dense, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.last_norm = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.attention_head_size)
        y = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).contiguous()
        x = self.norm(x + self.dense(y.view(*y.shape[:2], self.all_head_size)))
        return self.last_norm(x + self.down(F.gelu(self.up(x))))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)


class BERT(Language):
    """Tables of words and positions; the decoder is tied to the words."""

    def make(self) -> None:
        self.words, self.positions, self.norm = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Embedding(8, WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.layers = nn.ModuleList(BertLayer() for _ in range(2))
        self.decoder = nn.Linear(WIDTH, VOCABULARY)
        self.decoder.weight = self.words.weight
        self.register_buffer("ids", torch.arange(8))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.words(input_ids) + self.positions(self.ids[: input_ids.shape[1]]))
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.decoder(x)}


class Conv1D(nn.Module):
    """A linear layer with the weight of a convolution."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.1), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class GPTBlock(nn.Module):
    """Query, key and value are split by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.split_size, self.head_dim = WIDTH, WIDTH // HEADS
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.c_fc, self.c_out = Conv1D(40, WIDTH), Conv1D(WIDTH, 40)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.c_attn(self.ln_1(x)).split(self.split_size, dim=2)
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_dim).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.c_proj(y.reshape(*y.shape[:-2], -1).contiguous())
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class GPT2(Language):
    """Linear layers that are not torch's; the head is tied to the words."""

    def make(self) -> None:
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(8, WIDTH)
        self.h, self.ln_f = nn.ModuleList(GPTBlock() for _ in range(2)), nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        return {"logits": self.lm_head(self.ln_f(x))}


class RMSNorm(nn.Module):
    """A norm in float32, whatever the type of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class LlamaLayer(nn.Module):
    """Grouped queries with rotary positions, and a gated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = WIDTH // HEADS, 2
        self.norm, self.last_norm = RMSNorm(), RMSNorm()
        self.q_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 40, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(40, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, shape = self.norm(x), (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotated(q, cos, sin), self.repeated(rotated(k, cos, sin))
        y = F.scaled_dot_product_attention(q, k, self.repeated(v), is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(*x.shape[:-1], -1))
        y = self.last_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))

    def repeated(self, x: Tensor) -> Tensor:
        b, heads, n, size = x.shape
        groups = self.num_key_value_groups
        return x[:, :, None].expand(b, heads, groups, n, size).reshape(b, heads * groups, n, size)


class Llama(Language):
    """Rotary positions are computed once for all layers."""

    def make(self) -> None:
        self.embed_tokens, self.norm = nn.Embedding(VOCABULARY, WIDTH), RMSNorm()
        self.layers = nn.ModuleList(LlamaLayer() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("inv_freq", 1.0 / 100.0 ** (torch.arange(0, WIDTH // HEADS, 2) * HEADS / WIDTH), False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        angles = torch.arange(input_ids.shape[1], device=input_ids.device)[:, None] * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return {"logits": self.lm_head(self.norm(x))}


class T5Attention(nn.Module):
    """Attention without a scale, of which the first of a stack has a table of position biases."""

    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.key_value_proj_dim, self.n_heads, self.inner_dim = 6, HEADS, HEADS * 6
        self.q, self.k, self.v = (nn.Linear(WIDTH, self.inner_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(self.inner_dim, WIDTH, bias=False)
        self.relative_attention_bias = nn.Embedding(16, HEADS) if biased else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = (self.heads(layer(y)) for layer, y in ((self.q, x), (self.k, memory), (self.v, memory)))
        scores = q @ k.transpose(3, 2)
        if self.relative_attention_bias is not None:
            places = torch.arange(x.shape[1], device=x.device)
            scores = scores + self.relative_attention_bias(places - places[:, None] + 8).permute(2, 0, 1)[None]
        y = F.softmax(scores.float(), dim=-1).type_as(scores) @ v
        return self.o(y.transpose(1, 2).contiguous().view(x.shape[0], -1, self.inner_dim))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)


class T5Block(nn.Module):
    """Attention, over another sequence too in a decoder, and a layer that reads the type of its weight."""

    def __init__(self, biased: bool, decoder: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm() for _ in range(3))
        self.attention, self.cross = T5Attention(biased), T5Attention() if decoder else None
        self.wi, self.wo = nn.Linear(WIDTH, 40, bias=False), nn.Linear(40, WIDTH, bias=False)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        if self.cross is not None:
            x = x + self.cross(self.norms[1](x), memory)
        y = F.relu(self.wi(self.norms[2](x)))
        return x + self.wo(y.to(self.wo.weight.dtype) if y.dtype != self.wo.weight.dtype else y)


class T5(Language):
    """An encoder and a decoder that share a table, and a head that is tied to it."""

    def make(self) -> None:
        self.shared = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleList(T5Block(not number, False) for number in range(2))
        self.decoder = nn.ModuleList(T5Block(not number, True) for number in range(2))
        self.norm, self.lm_head = RMSNorm(), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.shared.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        memory = x = self.shared(input_ids)
        for block in self.encoder:
            memory = block(memory)
        for block in self.decoder:
            x = block(x, memory)
        return {"logits": self.lm_head(self.norm(x))}


LANGUAGE_PROJECTS: dict[str, type[Language]] = {"BERT": BERT, "GPT-2": GPT2, "Llama": Llama, "T5": T5}
