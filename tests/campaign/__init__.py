"""The fault campaign: the real server killed, starved, crowded and lied to, and what was acknowledged looked for after.

``make campaign`` runs every part and ends with a table; a slice of it is a test (``tests/app/test_campaign.py``).

    zygote    the process that has imported the server and forks it, so that a start takes 0.2 s instead of 9
    world     studies, model, server and folders of one part; requests
    journal   what clients saved and what was acknowledged; whether it is all there
    kills     SIGKILL at random moments and at every step of every kind of save; what a power cut would leave
    disk      a full disk
    readers   8 readers and a batch inference in another process
    corpus    bad inputs
    inputs    bad inputs sent, generated ones after them
    rows      the reliability table of MONAI Label 0.8.5, row by row
"""
