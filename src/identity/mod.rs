//! Who is speaking, and what may they do: tokens, keys, verification, policy.
