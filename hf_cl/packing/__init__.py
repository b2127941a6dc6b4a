"""Between finished tasks and a bank's files: what is stored of a task, taken apart again, proved, dropped."""
