"""The null-calibrated Polysemanticity Index, in order. READ FIRST.

Which question it answers: *which neurons of a network respond to several unrelated things, and how sure is that?* One
module a stage, one word a stage; each is plain calls on arrays and Arrow tables. None of it knows Ray, paths or actors.

    index       every image once: readable? which are the same picture?           -> images
    window      per layer: which box of the input does a position see?            -> layers
    mine        one pass over the probe set serves every layer: top examples      -> mine_parts, pool_peaks
    merge       ranges of images together                                         -> mined, histograms
    extract     peak positions become boxes; every (image, box) once              -> patches, pool
    embed       crop, resize, encode                                              -> embeddings, vocabulary
    cluster     k-means, S, Q, D of every neuron                                  -> scores, clusters, examples
    draw        null draws, and null neurons, through the same code               -> nulls, scores
    calibrate   z, p and log_psi of each preset                                   -> neurons, null_neurons
    summarise   what needs the whole sweep: q, AUROC, trends, diagnoses           -> neuron_summary, layer_summary

with causal patch swaps, after that:

    swap        hosts, donors, places; what the subject says of the pictures    -> swaps
    effects     do the clusters drive the neuron?                                 -> effects

with neurons of known truth planted on the network, before window and at the end:

    features    what the layers planted on give for one half of the images        -> plant_features
    plant       linear probes on them become neurons of one, two, three classes   -> planted, plant_classes
    recover     size, power, AUROC, k and names: was the truth found?             -> planted_neurons, planted_summary

and, of a sweep that has ended:

    sensitivity its scores beside those of a variant with one thing changed       -> sensitivity, sensitivity_neurons

Of a language model the examples are documents, and a patch is a snippet of one. The first stages have counterparts for
them, all others are the same code and the same tables:

    documents   index and mine: every document read once, in windows              -> images, mine_parts, pool_peaks
    snippets    window, extract, embed: what stands for a peak, and where it lies -> layers, patches, embeddings

Source: arXiv 2508.16950. Where we deviate, the docstring of the function that does so says it. The largest
deviation: besides the paper's nulls (`paper`) there are two more, `selective` (is the neuron selective at all?) and
`specific` (does it respond to more than one thing?), and significance rests on the latter.
"""
