"""Model folders of users in many forms: each is either merged correctly or refused in one sentence."""
