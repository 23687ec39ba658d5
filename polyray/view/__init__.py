"""The viewer: a dataset as pages, for people who look before they read.

Which question it answers: *what is there, and what does this neuron respond to?* Place in the flow: beside `report/`,
over `report/catalog.py`; reads the dataset alone, never a model. Nothing is kept between requests but what is read:
the address of a page holds all of its state.

In order: `columns` (what the table of neurons can show), `index` (what is sorted and filtered, in memory), `asked`
(what an address asks for), `neurons` (rows, search, neighbours), `layers` (the map), `neuron` and `language` (one
neuron), `charts` (SVG), `pictures`, `export`, `trying` (swaps, in service mode, which `serving/` answers), `words`
(text and numbers as shown), `guard` (who may ask), `site` (what requests share), `app` (the application), `serve`
(`polyray view`).
"""
