"""What other packages' caches are told of a pipeline that is not FLUX."""

from __future__ import annotations

import torch

from vllm_omni.quality.peers import _latents


def test_latents_of_every_layout_are_channels_frames_height_width() -> None:
    module = torch.nn.Identity()
    grid = torch.tensor([[0, row, column] for row in range(2) for column in range(3)])
    packed = torch.arange(2 * 6 * 4.0).reshape(2, 6, 4)
    seen = _latents(module, (), {"hidden_states": packed, "img_ids": grid})
    assert [one.shape for one in seen] == [(4, 1, 2, 3)] * 2
    assert seen[1][3, 0, 1, 2] == packed[1, 5, 3], "a token stays in its place"
    picture, clip = torch.rand(2, 16, 8, 8), torch.rand(1, 16, 5, 4, 4)
    assert torch.equal(_latents(module, (), {"hidden_states": picture})[1], picture[1].unsqueeze(1))
    assert torch.equal(_latents(module, (), {"hidden_states": clip})[0], clip[0])
