"""Categorical vector spaces of MLP neurons, in order. READ FIRST.

Which question it answers: *does a neuron of a language model respond the more to a token, the nearer that token is to
the categories which the neuron takes over from the neurons before it?* One module a stage, one word a stage; each is
plain calls on arrays. None of it knows Ray, paths or actors.

    count       tokens of the corpus, without the model; which are frequent enough
    mine        mean activation of every neuron at every such token; its core-tokens
    published   or, in place of mining, core-tokens that others have published (`science.core.published`)
    connect     which neurons of the layer before drive a neuron the most: its precursors
    overlap     core-tokens that it shares with them: its taken-clusters
    proximity   are tokens of high activation nearer to the taken-clusters?
    controls    the same with one thing broken: connections, clusters, order, embeddings
    summary     every layer and the whole sweep, with intervals, beside the controls
    clamp       a neuron held at a value: what changes behind it?

Arrays that the stages share (T kept tokens, N neurons of a layer, C = 100 core-tokens, P = 10 precursors):

    kept        int64 [T]       token ids that are frequent enough, ascending
    counts      int64 [T]       how often each is in the corpus
    sums        int64 [T, N]    activations added up, in units of 1 / `kernels.tokens.SCALE`
    core        int64 [N, C]    rows of kept (not token ids), highest mean first; −1 where T < C
    precursors  int64 [N, P]    neurons of the layer before; −1 where there are fewer
    taken       bool [N, P, C]  which core-tokens a precursor has as well

Source: arXiv 2505.07831.
"""
