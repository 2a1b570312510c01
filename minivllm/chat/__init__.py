"""`minivllm chat`: a conversation with a server, in the terminal."""
