"""Names of the UNet's modules, of which none is missing and none collides."""

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft

from sdxl_ambient.formats.names import SDXL_UNET, unet_names

# As they stand in LoRAs that kohya's scripts make, and in ComfyUI's tables.
DOCUMENTED = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj": "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
    "down_blocks.2.attentions.0.proj_out": "input_blocks_7_1_proj_out",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks_7_0_skip_connection",
    "mid_block.resnets.0.conv2": "middle_block_0_out_layers_3",
    "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0": "middle_block_1_transformer_blocks_9_attn2_to_out_0",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.2.proj_in": "output_blocks_2_1_proj_in",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2": "output_blocks_5_1_transformer_blocks_1_ff_net_2",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
}


def test_every_module_of_the_real_sdxl_has_its_name_and_none_collide():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    modules = {n for n, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    names = {layout: unet_names(layout) for layout in ("sgm", "diffusers")}
    assert len(modules) == 794 and all(set(n) == modules for n in names.values())
    for module, name in DOCUMENTED.items():
        assert names["sgm"][module] == f"lora_unet_{name}"
        assert names["diffusers"][module] == f"lora_unet_{module.replace('.', '_')}"
    # No name means one module in one layout and another in the other.
    both = [{kohya: module for module, kohya in n.items()} for n in names.values()]
    assert all(both[0][k] == both[1][k] for k in both[0].keys() & both[1].keys())
    # diffusers, which reads the same format, finds each.
    state = {}
    for i, module in enumerate(sorted(modules)):
        for kind in ("down", "up"):
            state[f"{names['sgm'][module]}.lora_{kind}.weight"] = torch.tensor(float(i))
    converted, _ = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=unet.config)
    found = {int(v): k for k, v in convert_unet_state_dict_to_peft(converted).items() if ".lora_A" in k}
    assert found == {i: f"unet.{module}.lora_A.weight" for i, module in enumerate(sorted(modules))}
