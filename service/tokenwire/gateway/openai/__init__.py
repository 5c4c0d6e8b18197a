"""The part of OpenAI's API that a text model can serve: models, completions, chat completions."""
