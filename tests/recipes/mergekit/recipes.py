"""Recipes in mergekit's words, as its documentation has them, of the small models in `tests.recipes.mergekit.naive`."""

RECIPES = {
    "linear": """\
models:
  - model: base
    parameters: {weight: 1.0}
  - model: poet
    parameters:
      weight: 0.3
  - {model: coder, parameters: {weight: 0.5}}
merge_method: linear
dtype: float32
""",
    "linear, weights not normalised, one for all": """\
models:
  - model: poet
  - model: coder
merge_method: linear
parameters:
  weight: 0.4
  normalize: false
dtype: float32
""",
    "linear, a base model that is not listed counts too": """\
models:
  - model: poet
  - model: coder
base_model: base
merge_method: linear
parameters: {weight: [1, 0.5]}
dtype: float32
out_dtype: bfloat16
""",
    "task_arithmetic": """\
base_model: base
models:
  - model: poet
    parameters: {weight: 0.7}
  - model: coder
    parameters: {weight: -0.4}
merge_method: task_arithmetic
parameters:
  lambda: 1.2
dtype: bfloat16
""",
    "task_arithmetic, gradients over the layers": """\
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - model: poet
    parameters:
      weight: [0.0, 0.25, 1.0]
  - model: coder
    parameters:
      weight: [1, 0]
dtype: float32
""",
    "task_arithmetic, a mean of weights that sum to zero in the first layer": """\
base_model: base
models:
  - model: poet
    parameters: {weight: [1, 0.5]}
  - model: coder
    parameters: {weight: [-1, 1]}
merge_method: task_arithmetic
parameters: {normalize: true}
dtype: float32
""",
    "ties, a density above one and a filter that fits everything": """\
base_model: base
models:
  - {model: poet, parameters: {weight: 1, density: 1.5}}
  - {model: coder, parameters: {weight: [{filter: mlp, value: 0.5}, {filter: "", value: true}], density: 0.5}}
merge_method: ties
dtype: float32
""",
    "task_arithmetic, filters and a mean": """\
merge_method: task_arithmetic
base_model: base
models:
  - model: poet
    parameters:
      weight:
        - {filter: self_attn, value: [0.1, 0.9]}
        - {filter: mlp, value: 0.5}
  - model: coder
    parameters:
      weight:
        - filter: down_proj
          value: 0.2
        - value: 1e-1
parameters:
  normalize: true
  weight: 0.25
dtype: float32
""",
    "task_arithmetic, the first condition that fits holds": """\
merge_method: task_arithmetic
base_model: base
models:
  - model: poet
    parameters:
      weight:
        - {filter: layers.0., value: 2}
        - {filter: "*", value: 0.5}
        - {filter: mlp, value: 1}
dtype: float32
""",
    "linear, slices that leave the base model out": """\
merge_method: linear
base_model: base
slices:
  - sources:
      - {model: poet, layer_range: [0, 4], parameters: {weight: 0.3}}
      - {model: coder, layer_range: [0, 4]}
    parameters: {weight: 0.6}
parameters: {weight: 5}
dtype: float32
""",
    "ties": """\
models:
  - model: base
    # nothing to say of the base
  - model: poet
    parameters: {density: 0.5, weight: 0.5}
  - model: coder
    parameters: {density: 0.25, weight: 0.3}
  - model: doctor
    parameters: {density: 0.75, weight: 0.4}
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "ties, a sum, density by layer": """\
models:
  - {model: poet, parameters: {density: [1, 0.5], weight: 1.0}}
  - {model: coder, parameters: {density: 0.25, weight: [0, 0.5]}}
merge_method: ties
base_model: base
parameters:
  normalize: false
  lambda: [{filter: mlp, value: [0.5, 1]}]
dtype: float32
""",
    "dare_linear": """\
models:
  - {model: poet, parameters: {density: 0.5, weight: 0.75}}
merge_method: dare_linear
base_model: base
dtype: float32
""",
    "dare_ties": """\
models:
  - {model: poet, parameters: {density: 0.75, weight: 0.5}}
  - {model: coder, parameters: {density: 0.25, weight: 0.5}}
merge_method: dare_ties
base_model: base
parameters: {int8_mask: true}
dtype: float32
""",
    "dare_ties, kept whole": """\
models:
  - {model: poet, parameters: {weight: 0.5}}
  - {model: coder, parameters: {weight: 0.25}}
merge_method: dare_ties
base_model: base
dtype: float32
""",
    "della": """\
models:
  - {model: poet, parameters: {density: 0.5, weight: 1, epsilon: 0.2}}
merge_method: della
base_model: base
parameters: {lambda: 1.1}
dtype: float32
""",
    "della_linear, kept whole": """\
models:
  - {model: poet, parameters: {density: 1, weight: 0.5}}
  - {model: coder, parameters: {density: 1, weight: 0.25}}
merge_method: della_linear
base_model: base
dtype: float32
""",
    "breadcrumbs": """\
models:
  - {model: poet, parameters: {density: 0.5, gamma: 0.125, weight: 0.5}}
  - {model: coder, parameters: {density: 0.75, weight: 0.5}}
merge_method: breadcrumbs
base_model: base
dtype: float32
""",
    "breadcrumbs_ties": """\
models:
  - model: poet
  - model: coder
  - model: doctor
merge_method: breadcrumbs_ties
base_model: base
parameters: {density: 0.5, gamma: 0.25, weight: 0.5}
dtype: float32
""",
    "sce": """\
merge_method: sce
base_model: base
models: [{model: poet}, {model: coder}, {model: doctor}]
parameters:
  select_topk: 0.5
dtype: float32
""",
    "slerp": """\
slices:
  - sources:
      - model: base
        layer_range: [0, 4]
      - model: poet
        layer_range: [0, 4]
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "nearswap": """\
models: [{model: base}, {model: poet}]
merge_method: nearswap
base_model: base
parameters: {t: 1e-2}
dtype: float32
""",
    "model_stock": """\
models:
  - model: poet
  - model: coder
  - model: doctor
base_model: base
merge_method: model_stock
dtype: float32
""",
    "karcher": """\
models:
  - model: poet
  - model: coder
  - model: doctor
merge_method: karcher
parameters: {max_iter: 20, tol: 1e-6}
dtype: float32
""",
    "passthrough, scaled": """\
models:
  - model: poet
    parameters:
      scale:
        - {filter: o_proj, value: 0}
        - value: 1
merge_method: passthrough
dtype: float32
""",
    "an adapter as a model": """\
base_model: base
models:
  - model: base+speaker
    parameters: {weight: 0.5}
  - model: {model: {path: coder}}
    parameters: {weight: 0.5}
merge_method: task_arithmetic
dtype: float32
tokenizer_source: base
""",
}
