"""The only room that knows diffusers: loading, generating, checkpoints, and tiny-wan."""
