"""The demo world: small drawn products, and two small backbones in demo/llama and demo/vit."""
