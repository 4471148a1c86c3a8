"""The command `synpo`."""
