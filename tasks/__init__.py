"""Tasks and prompts beside Countdown (countdown.py): general.py is greetings, small talk and direct arithmetic."""
