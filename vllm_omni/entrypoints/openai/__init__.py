"""The HTTP application: OpenAI's images, chat and videos APIs over an engine client. Knows no tensors."""
