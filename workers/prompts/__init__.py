"""From text and chats to segments of token ids.

May import `workers.models`, `workers.errors` and `attention`. Imports no torch; transformers only when
a function needs it.
"""
