_base_ = './mlla-t_8xb128_in1k.py'

# The average of the weights is still kept and evaluated, but does not teach.
model = dict(mesa_weight=0.0)
