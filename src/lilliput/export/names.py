"""Names behind the numbers in a packed graph. Only append: a change would alter the meaning of old files.

Every operator of the ONNX standard up to onnx 1.23 and every attribute of theirs, the frequent ones first so that they
take one byte. New names go to the end; a test holds the list that has been published.
"""

OPERATORS: tuple[str, ...] = (
    "Conv", "Relu", "Add", "Gemm", "MatMul", "Mul", "Flatten", "GlobalAveragePool", "Reshape", "Transpose", "Cast",
    "Sub", "Div", "Softmax", "Gather", "Unsqueeze", "Squeeze", "Concat", "Slice", "Shape", "Abs", "Acos", "Acosh",
    "AffineGrid", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "Attention", "AveragePool",
    "BatchNormalization", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "BlackmanWindow", "CastLike", "CausalConvWithState", "Ceil", "Celu", "CenterCropPad", "Clip", "Col2Im",
    "Compress", "ConcatFromSequence", "Constant", "ConstantOfShape", "ConvInteger", "ConvTranspose", "Cos", "Cosh",
    "CumProd", "CumSum", "DFT", "DeformConv", "DepthToSpace", "DequantizeLinear", "Det", "Dropout",
    "DynamicQuantizeLinear", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Floor", "GRU",
    "GatherElements", "GatherND", "Gelu", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual",
    "GridSample", "GroupNormalization", "HammingWindow", "HannWindow", "HardSigmoid", "HardSwish", "Hardmax",
    "Identity", "If", "ImageDecoder", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "LinearAttention", "Log", "LogSoftmax", "Loop",
    "LpNormalization", "LpPool", "MatMulInteger", "Max", "MaxPool", "MaxRoiPool", "MaxUnpool", "Mean",
    "MeanVarianceNormalization", "MelWeightMatrix", "Min", "Mish", "Mod", "Multinomial", "Neg",
    "NegativeLogLikelihoodLoss", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Optional", "OptionalGetElement",
    "OptionalHasElement", "Or", "PRelu", "Pad", "Pow", "QLinearConv", "QLinearMatMul", "QuantizeLinear",
    "RMSNormalization", "RNN", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "RegexFullMatch", "Resize", "ReverseSequence", "RoiAlign",
    "RotaryEmbedding", "Round", "STFT", "Scan", "Scatter", "ScatterElements", "ScatterND", "Selu", "SequenceAt",
    "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
    "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "SoftmaxCrossEntropyLoss", "Softplus", "Softsign",
    "SpaceToDepth", "Split", "SplitToSequence", "Sqrt", "StringConcat", "StringNormalizer", "StringSplit", "Sum",
    "SwiGLU", "Swish", "Tan", "Tanh", "TensorScatter", "TfIdfVectorizer", "ThresholdedRelu", "Tile", "TopK",
    "Trilu", "Unique", "Upsample", "Where", "Xor",
)  # fmt: skip

ATTRIBUTES: tuple[str, ...] = (
    "pads", "strides", "group", "dilations", "transB", "axis", "to", "perm", "alpha", "beta", "epsilon",
    "kernel_shape", "axes", "keepdims", "activation", "activation_alpha", "activation_beta", "activations",
    "align_corners", "allowzero", "antialias", "approximate", "auto_pad", "batch_axis", "batch_dims", "bias",
    "block_size", "blocksize", "body", "broadcast", "case_change_action", "ceil_mode", "center_point_box",
    "chunk_size", "clip", "consumed_inputs", "coordinate_transformation_mode", "count_include_pad", "cubic_coeff_a",
    "delimiter", "detect_negative", "detect_positive", "direction", "directions", "dtype", "else_branch", "end",
    "ends", "equation", "exclude_outside", "exclusive", "extrapolation_value", "fmod", "gamma", "height_scale",
    "hidden_size", "high", "ignore_index", "input_forget", "interleaved", "inverse", "is_case_sensitive",
    "is_causal", "is_test", "k", "keep_aspect_ratio_policy", "kv_num_heads", "lambd", "largest", "layout",
    "left_window_size", "linear_before_reset", "locale", "low", "max", "max_gram_length", "max_skip_count",
    "maxsplit", "mean", "min", "min_gram_length", "mode", "momentum", "nearest_mode", "new_axis", "ngram_counts",
    "ngram_indexes", "noop_with_empty_axes", "num_groups", "num_heads", "num_outputs", "num_scan_inputs",
    "offset_group", "onesided", "output_datatype", "output_dtype", "output_height", "output_padding",
    "output_sequence", "output_shape", "output_width", "p", "padding_mode", "paddings", "pattern", "periodic",
    "pixel_format", "pool_int64s", "pool_strings", "pooled_shape", "precision", "q_num_heads",
    "qk_matmul_output_mode", "ratio", "reduction", "reverse", "right_window_size", "rotary_embedding_dim",
    "round_mode", "sample_size", "sampling_ratio", "saturate", "scale", "scales", "scan_input_axes",
    "scan_input_directions", "scan_output_axes", "scan_output_directions", "seed", "select_last_index", "shape",
    "size", "softcap", "softmax_precision", "sorted", "sparse_value", "spatial", "spatial_scale", "split", "start",
    "starts", "stash_type", "stopwords", "storage_order", "then_branch", "time_axis", "training_mode", "transA",
    "type", "update_rule", "upper", "value", "value_float", "value_floats", "value_int", "value_ints",
    "value_string", "value_strings", "weights", "width_scale",
)  # fmt: skip
