"""How fast X-rays come in, beside what plain loops on the same machine do with the same files in the same run."""
