"""What stands in the place of a layer that has adapters: its forward, merging and undoing that.

Door, what other rooms import:

    composite_layer.py  AdaptedComposite: the wrapper around a module that computes with several weights itself, as
                        nn.MultiheadAttention
    factored_weight.py  A weight plus products of thin matrices that are not multiplied out: only what a product
                        touches is computed
    fake_quant.py       Training that knows the grid its result will be rounded to (quantization-aware training)
    layer.py            AdaptedLayer: the only wrapper around a layer, whatever the method, the kind of layer and the
                        backend
    merge_checks.py     Whether a layer computes with the weight it stores and nothing else, as merging takes for
                        granted
    modules_to_save.py  ModulesToSaveWrapper: a module trained as a whole, once per adapter (``modules_to_save``)
    parameter_layer.py  AdaptedParameter: the wrapper around a module of which one bare parameter is adapted, as the
                        experts of a mixture
    row_order.py        Which row of a mixed batch each part of a layer's input belongs to, as far as its shape says
                        so
"""
