"""Service mode: the viewer for a group, with the network at hand for one question.

Which question it answers: *what would this neuron say if that patch stood in this image?* Place in the flow: around
`view/`, which it leaves as it is; the only part of polyray beside a sweep that holds a subject. Off unless
`polyray serve` starts it.

In order: `bench` (the network, and the answer), `gate` (who may ask), `deployment` (both as parts of a Ray Serve
application), `start` (`polyray serve`). What the page shows and asks stands in `view/trying.py`.
"""
