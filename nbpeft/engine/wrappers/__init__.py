"""The modules that replace a layer with adapters: its forward pass, merging and unmerging.

Door, what other rooms import:

    block.py            AdaptedBlock: the wrapper around a block whose input a side network changes
    composite_layer.py  AdaptedComposite: the wrapper around a module that computes with several weights itself
                        (nn.MultiheadAttention)
    extension.py        Lets rooms above the engine add the attributes that other libraries expect
    factored_weight.py  A weight plus low-rank products that stay factored, so that only what a matrix product needs
                        is computed
    fake_quant.py       Quantization-aware training: the layer computes with the weight that merging the adapter would
                        store
    layer.py            AdaptedLayer: the only wrapper around a layer, whatever the method, the kind of layer and the
                        backend
    merge_checks.py     Checks whether a layer computes ``W x + b`` with the weight that it stores, which merging
                        requires
    modules_to_save.py  ModulesToSaveWrapper: a module trained as a whole, once per adapter (``modules_to_save``)
    parameter_layer.py  AdaptedParameter: the wrapper around a module with an adapted bare parameter, such as the
                        experts of a mixture
    row_order.py        Checks by shape that a layer's input in a mixed batch is in the order of the batch's rows
    wrapper.py          Wrapper: base class of the modules that replace a layer, or a module trained as a whole

Inside:

    mixed_batch.py  The output of an adapted layer for a mixed batch, in which each row has its own adapter
"""
