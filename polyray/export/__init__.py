"""Export: a dataset in the forms of other people's tools, from its tables alone.

Place in the flow: after `dataset.py`, beside `report/`.

    neuron_records   a file a neuron, as OpenAI's neuron explainer and viewer read them
    target           the folder that is written: whole files or none, and never one that holds something else
    choice           which layers and neurons
    tokens           tokens as text again, from their printable form
"""
