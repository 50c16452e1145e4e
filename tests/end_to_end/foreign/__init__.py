"""What strangers bring: folders of users in many forms, each either taken and right, or refused in one sentence."""
