"""The page for people: the chat that `GET /` shows, and the conversations that the server keeps for it.

`site` serves the files of `static/`, `routes` and `answer` are what they ask for, `conversations` is where turns lie,
`markdown` makes HTML of answers. The page itself is plain HTML, CSS and ES modules; nothing of it comes from elsewhere.
"""
