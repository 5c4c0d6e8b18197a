"""Load and its measurement: when requests are sent, what their streams looked like, and honest statistics of that.

`load` does not know what answers: it takes any coroutine that sends one request. `worker` makes one for tokenwire.
"""
