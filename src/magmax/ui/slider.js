export default {
  props: { modelValue: Number, min: Number, max: Number, step: Number },
  emits: ["update:modelValue"],
  template: `<input type="range" :min="min" :max="max" :step="step" :value="modelValue"
    :style="{ '--p': (modelValue - min) / (max - min) }"
    @input="$emit('update:modelValue', Number($event.target.value))">`,
};
