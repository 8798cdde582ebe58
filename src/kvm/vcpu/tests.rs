//! A reply of KVM is data: these need no KVM.
use super::*;

fn internal(suberror: u32, words: &[u64]) -> b::kvm_run__bindgen_ty_1__bindgen_ty_13 {
    let mut data = [0; 16];
    data[..words.len()].copy_from_slice(words);
    b::kvm_run__bindgen_ty_1__bindgen_ty_13 { suberror, ndata: words.len() as u32, data }
}

#[test]
fn a_failed_emulation_tells_the_instruction() {
    // Length 4, then 0f 01 c8 90.
    let broken = internal_error(&internal(1, &[1, 0x0090_c801_0f04]), 0x1000);
    assert_eq!(broken.to_string(), "KVM cannot emulate the instruction 0f 01 c8 90 at 0x1000");
}

#[test]
fn a_failed_emulation_without_bytes_says_so() {
    let broken = internal_error(&internal(1, &[]), 0x1000);
    assert_eq!(broken.to_string(), "KVM cannot emulate the instruction (bytes unknown) at 0x1000");
}

#[test]
fn an_internal_error_is_told_with_its_data() {
    let mut error = internal(3, &[0x80, 5]);
    assert!(internal_error(&error, 0).to_string().contains("suberror 3, data [80, 5]"));
    error.ndata = u32::MAX;
    assert!(matches!(internal_error(&error, 0), Broken::Internal { data, .. } if data.len() == 16));
}
