"""CLIPTextModel; module paths follow transformers' weight files (`text_model.…`)."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn

from diffusion.attention import MultiHead
from diffusion.config import TextEncoderConfig
from diffusion.layers import (
    GELU,
    Embedding,
    LayerNorm,
    Linear,
    Network,
    name_parameters,
    quick_gelu,
    shared,
)


class Embeddings(nn.Cell):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def construct(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Cell):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        width = config.hidden_size
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)
        self.attend = shared(MultiHead, width, config.num_attention_heads, True)

    def construct(self, x: Tensor) -> Tensor:
        return self.out_proj(self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class MLP(nn.Cell):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.activation = shared(GELU) if config.hidden_act == "gelu" else quick_gelu

    def construct(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Cell):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.layer_norm2 = LayerNorm(config.hidden_size)

    def construct(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Cell):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.layers = nn.CellList([EncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def construct(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextModel(nn.Cell):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size)

    def construct(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class CLIPTextModel(Network):
    """Token ids (batch, tokens) int32 → hidden states (batch, tokens, hidden_size), float32.

    It computes in the dtype of its embeddings.
    """

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.text_model = TextModel(config)
        name_parameters(self)

    def construct(self, ids: Tensor) -> Tensor:
        return self.text_model(ids).astype(ms.float32)
