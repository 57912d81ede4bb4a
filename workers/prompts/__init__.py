"""From text and chats to segments of token ids.

May import `workers.models.adapter_record`, `workers.rows` and `attention`. No tensor.
"""
