"""Networks: backbones, temporal modules and the recognisers made of them."""
