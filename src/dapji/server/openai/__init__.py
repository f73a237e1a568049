"""The protocol of OpenAI's API, a file for each endpoint."""
